"""The names of the precisions that an op may be found to behave like."""

TF32_POLICY, BF16_POLICY = "TF32 products", "bfloat16 products"
REDUCED_POLICY, LOW_POLICY = "reduced-precision reduction", "sums kept in the output's precision"
