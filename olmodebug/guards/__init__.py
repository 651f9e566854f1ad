"""What watches a training script while it runs: one module a guard, the bootstrap that carries them into it, and the diagnosis.

`settings`, `journal`, `pages` and `decode` need no torch: the command line and a script that never imports torch pay nothing.
"""
