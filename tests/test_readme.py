"""What the README tells a user to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Command
from ldpruner import calibration, planning

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


FEWER = {"100": "20", "8": "2", "4": "1"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every `ldpruner` line of the README, in order, but for those that train."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in typed if line.startswith("ldpruner ") and "zoo train" not in line]


def fewer(text: str) -> str:
    """The same on two samples and one step to score by, on twenty to evaluate and five to time: a third of the time."""
    text = text.replace("ldpruner benchmark", "ldpruner benchmark --rounds 5")
    return re.sub(r"(?<= -n )100|((?<=samples[ =])|(?<=steps[ =]))[48]\b", lambda number: FEWER[number[0]], text)


@pytest.mark.slow
def test_the_commands_and_then_the_python_example_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(commands()) >= 6
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "CALIBRATING", 2)
    monkeypatch.setattr(planning, "JUDGED_ON", 2)
    monkeypatch.setattr(planning, "FINALISTS", 1)
    for line in fewer("\n".join(commands())).splitlines():
        code, _, said = command(*shlex.split(line, comments=True)[1:])
        assert code == 0, f"{line}\n{said}"
    exec(compile(fewer("\n".join(blocks("python"))), "README.md", "exec"), {"__name__": "__main__"})


def test_every_file_of_the_tree_exists() -> None:
    tree = next(block for block in blocks("text") if "src/ldpruner/" in block)
    folder = ROOT
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        base = ROOT if not indent else folder
        path = base / name
        assert path.exists(), name
        if path.is_dir() and not indent:
            folder = path


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['ldpruner', '--help']\n"
        "from ldpruner import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout
