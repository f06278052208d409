"""What the README tells a user to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ldpruner import Pipeline

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every `ldpruner` line of the README, in order, but for those that train."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in typed if line.startswith("ldpruner ") and "zoo train" not in line]


@pytest.mark.slow
def test_the_commands_and_then_the_python_example_run(tmp_path: Path) -> None:
    assert len(commands()) >= 6
    for line in commands():
        words = shlex.split(line, comments=True)
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.slow
def test_the_demo_and_the_benchmarks_run_reduced(ldm_folder: Path, tmp_path: Path) -> None:
    demo = [ROOT / "examples" / "demo.py", "--out", tmp_path / "demo", "--samples", "2", "--steps", "1", "--latency", "95%"]
    cost = [ROOT / "benchmarks" / "scoring_cost.py", "--samples", "2", "--steps", "1", "--every", "20"]
    few = ["--samples", "4", "--steps", "1", "--score-samples", "2", "--score-steps", "1", "--budgets", "98%", "95%"]
    ladder = [
        ROOT / "benchmarks" / "quality_by_latency.py",
        "fashion",
        *few,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "docs",
    ]
    for words in (demo, cost, ladder):
        line = [sys.executable, *words, "--model", ldm_folder]
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
    assert (tmp_path / "docs" / "zoo-fashion.png").stat().st_size > 0
    rungs = json.loads((tmp_path / "docs" / "zoo.json").read_text(encoding="utf-8"))["models"]["fashion"]["pruned"]
    assert [rung["budget"] for rung in rungs] == ["98%", "95%"]
    page = (tmp_path / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert f"| Latent shift ↓ |  | {rungs[0]['figures']['latent-shift']['value']:.4g} |" in page


@pytest.mark.slow
def test_the_demo_of_sound_leaves_something_to_listen_to(audio: Pipeline, tmp_path: Path) -> None:
    audio.pipe.save_pretrained(tmp_path / "tiny-audio")
    few = ["--samples", "2", "--steps", "1", "--latency", "98%", "--model", tmp_path / "tiny-audio", "--out", tmp_path / "demo"]
    line = [sys.executable, ROOT / "examples" / "demo.py", "digits", *few]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "demo" / "sounds-original").glob("*.wav"))) == 8
    assert len(list((tmp_path / "demo" / "sounds-pruned").glob("*.wav"))) == 8
    assert (tmp_path / "demo" / "original-above-pruned.png").stat().st_size > 0
