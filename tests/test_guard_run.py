"""`olmodebug run`: the script keeps its output, exit status and signals, and what was seen is on disk whatever happens."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from olmodebug.errors import UsageError
from olmodebug.guards.journal import Journal, read_journals
from olmodebug.guards.settings import Settings, child_environment, parse_guards, redacted, secrets_of
from olmodebug.records import Where
from olmodebug.report import Finding, Report, from_json

BAD_INDEX = "import torch\ntable = torch.zeros(8, 2)\ntry:\n    table[torch.tensor([8])]\nexcept IndexError:\n    pass\n"
NEVER_RESET = """import torch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
"""


def run_script(
    folder: Path, text: str, *, options: tuple[str, ...] = (), **environ: str
) -> tuple[subprocess.CompletedProcess[str], Report]:
    """A script under `olmodebug run`, and the report in its record."""
    (folder / "script.py").write_text(textwrap.dedent(text))
    line = [sys.executable, "-m", "olmodebug", "run", *options, "--", sys.executable, "script.py"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": root, **environ}
    )
    record = max((folder / ".olmodebug" / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return done, from_json((record / "report.json").read_text())


def test_os_exit_and_a_secret_leave_a_readable_record(tmp_path: Path) -> None:
    text = BAD_INDEX + 'import os\ntoken = os.environ["MY_API_TOKEN"]\nprint(token)\nos._exit(4)\n'
    text = text.replace("    pass", "    table[torch.tensor([1])]  # hunter2-is-secret")
    done, report = run_script(tmp_path, text, MY_API_TOKEN="hunter2-is-secret")
    assert done.returncode == 4
    assert done.stdout == "hunter2-is-secret\n"  # the script's own output is not touched
    (finding,) = report.findings
    assert (finding.where.file, finding.where.line) == ("script.py", 4)
    assert report.sections["guard"]["processes"][0]["ended"] == "before its last line was written"
    written = "".join(path.read_text() for path in (tmp_path / ".olmodebug").rglob("*") if path.is_file())
    assert "hunter2" not in written


def test_an_error_finding_makes_a_successful_script_exit_1(tmp_path: Path) -> None:
    done, report = run_script(tmp_path, NEVER_RESET + "print('done')\n", options=("--json", "out.json"))
    assert done.returncode == 1
    assert done.stdout == "done\n"
    assert "nothing reset them after optimizer.step() at script.py:6" in done.stderr
    assert report.sections["guard"]["ended"]["status"] == 0
    assert from_json((tmp_path / "out.json").read_text()).findings == report.findings


def test_a_script_that_catches_its_error_keeps_exit_status_0(tmp_path: Path) -> None:
    done, report = run_script(tmp_path, BAD_INDEX + "print('done')\n")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert [(f.probe, f.severity) for f in report.findings] == [("index.in-bounds", "warning")]
    assert "index 8 is out of range: `table` has 8 rows (the script caught the exception and went on)" in done.stderr


def test_os_exit_after_a_caught_error_keeps_its_status(tmp_path: Path) -> None:
    done, report = run_script(tmp_path, BAD_INDEX + "import os\nprint('done', flush=True)\nos._exit(0)\n")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert [(f.probe, f.severity) for f in report.findings] == [("index.in-bounds", "warning")]
    assert "(the script caught the exception and went on)" in report.findings[0].message


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_an_error_of_a_worker_that_the_script_catches_is_a_warning(tmp_path: Path, context: str) -> None:
    text = f"""
    import torch
    from torch.utils.data import DataLoader

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, i):
            return torch.arange(4)[torch.tensor([i])]

    if __name__ == "__main__":
        try:
            list(DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context="{context}"))
        except IndexError:
            print("caught")
    """
    done, report = run_script(tmp_path, text)
    assert (done.returncode, done.stdout) == (0, "caught\n")
    assert [(f.probe, f.severity, f.where.line) for f in report.findings] == [("index.in-bounds", "warning", 9)]


def test_a_script_without_torch_says_that_nothing_was_checked(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.users_own = True\n")
    done, report = run_script(tmp_path, "import sys; print(sys.users_own)\n", PYTHONPATH=f"{Path(__file__).parents[1]}:{tmp_path}")
    assert (done.returncode, done.stdout) == (5, "True\n")
    assert "nothing was checked" in done.stderr
    assert {outcome.status for outcome in report.outcomes} == {"not-applicable"}
    status, _ = run_script(tmp_path, "raise SystemExit(7)\n")
    assert status.returncode == 7


@pytest.mark.slow
def test_a_segmentation_fault_is_placed_at_its_line(tmp_path: Path) -> None:
    done, report = run_script(tmp_path, "import torch\nimport ctypes\ntorch.zeros(3)\ndef crash():\n    ctypes.string_at(0)\ncrash()\n")
    assert done.returncode == 128 + signal.SIGSEGV
    (finding,) = report.findings
    assert (finding.probe, finding.where.line, finding.where.function) == ("process.survives", 5, "crash")


@pytest.mark.slow
def test_ctrl_c_reaches_the_script_and_the_record_stays(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(BAD_INDEX + "import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    line = [sys.executable, "-m", "olmodebug", "run", "--", sys.executable, "script.py"]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        line,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and "index 8 is out of range" in err
    assert process.returncode in (128 + signal.SIGINT, 130)


@pytest.mark.slow
def test_own_modes_workers_compile_and_long_output_are_survived(tmp_path: Path) -> None:
    text = """
    import sys, time
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.data import DataLoader

    class Counts(TorchDispatchMode):
        ops = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counts.ops += 1
            return func(*args, **(kwargs or {}))

    def main():
        torch.manual_seed(0)
        with Counts():
            torch.ones(3).add(1)
        assert Counts.ops == 2, Counts.ops
        loader = DataLoader(list(range(8)), batch_size=4, num_workers=2, multiprocessing_context=sys.argv[1] if len(sys.argv) > 1 else "fork")
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        calls = []
        def backend(graph, inputs):
            calls.append(len(graph.graph.nodes))
            return graph.forward
        compiled = torch.compile(lambda x: (x.sin() + 1).sum(), backend=backend, fullgraph=True)
        x = torch.randn(5, requires_grad=True)
        compiled(x).backward()
        assert calls, "torch.compile ran eagerly"
        with torch.inference_mode():
            torch.zeros(4)[torch.tensor([1, 2])]
        print("x" * 3_000_000)

    if __name__ == "__main__":
        main()
    """
    done, report = run_script(tmp_path, text)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) == 3_000_001
    assert not report.findings


def test_guards_are_named_and_anything_else_is_refused() -> None:
    assert parse_guards("nan,index") == ("index", "nan")
    with pytest.raises(UsageError, match="expected some of index,nan,shape,oom,loop"):
        parse_guards("index,speed")
    with pytest.raises(UsageError):
        parse_guards("")


def test_a_command_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "olmodebug", "run", "--", "no-such-command"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 2
    assert done.stderr == "olmodebug: cannot start no-such-command: No such file or directory\n"


def test_secrets_are_found_by_the_name_of_their_variable() -> None:
    values = secrets_of({"WANDB_API_KEY": "abcdefgh", "HF_TOKEN": "xyz12345", "HOME": "/home/me", "USE_AUTH": "1"})
    assert set(values) == {"abcdefgh", "xyz12345"}
    assert redacted("--key=abcdefgh", values) == "--key=***"


def test_the_environment_of_the_child_keeps_the_users_path(tmp_path: Path) -> None:
    made = child_environment(Settings(guards=("index",), folder=tmp_path), {"PYTHONPATH": "/a:/b", "X": "1"})
    assert made["PYTHONPATH"].endswith(":/a:/b") and made["X"] == "1"


def test_a_journal_is_readable_line_by_line_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.tell("start", time=time.time())
    finding = Finding(probe="index.in-bounds", severity="error", message="no", where=Where(file="a.py", line=3))
    assert journal.find(finding) and not journal.find(finding)
    path = tmp_path / f"journal-{os.getpid()}.jsonl"
    with path.open("a") as file:
        file.write('{"event": "en')
    (events,) = read_journals(tmp_path)
    assert [event["event"] for event in events] == ["start", "finding"]
    assert json.loads(path.read_text().splitlines()[1])["finding"]["where"]["line"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("fault", "probe"), [("torch.arange(4)[torch.tensor([i])]", "index.in-bounds"), ("torch.ones(2) + torch.ones(3 + i)", "shape.fits")]
)
def test_a_fault_in_a_worker_is_told_once_at_the_workers_line(tmp_path: Path, context: str, fault: str, probe: str) -> None:
    text = f"""
    import torch
    from torch.utils.data import DataLoader

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, i):
            return {fault}

    if __name__ == "__main__":
        list(DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context="{context}"))
    """
    done, report = run_script(tmp_path, text)
    assert done.returncode == 1
    assert [(f.probe, f.where.line, f.where.function) for f in report.findings] == [
        (probe, 9, "Rows.__getitem__" if probe.startswith("index") else "__getitem__")
    ]
