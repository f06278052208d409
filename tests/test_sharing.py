"""What is pushed to the Hub comes back bit for bit, and what goes wrong on the way is one line. The Hub is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

import ldpruner
from conftest import Command, tiny_ldm
from hub_stand_in import READS, WRITES, Hub, Repo, go_online, online_environment, stand_in
from ldpruner import Plan, cards, sharing
from ldpruner.errors import HubError, PlanError
from ldpruner.markdown import MARKER
from ldpruner.pipelines import Pipeline
from ldpruner.plans import PLAN
from ldpruner.workflow import Pruned
from one_file import PROBE, small_plan
from refusing import the_line
from saving import CHOSEN, INPUTS, WITHOUT_US, output_of, plan_for, run_child

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub, of its own upload of large files
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning"),  # and of what diffusers asks it for
    pytest.mark.usefixtures("online"),
]
NOWHERE = "http://127.0.0.1:9"  # the port on which no one answers


@pytest.fixture(scope="module")
def pruned() -> Pruned:
    pipeline = Pipeline(tiny_ldm(), source="tiny-unconditional")
    return ldpruner.prune(pipeline, plan=plan_for(pipeline, CHOSEN["unconditional"]))


@pytest.fixture(scope="module")
def folder(pruned: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "tiny"
    pruned.save_pretrained(out, form="plugin")
    (out / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with stand_in() as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_online(monkeypatch, hub.url, tmp_path / "hub")


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_portable_pipeline_comes_back_from_the_hub_without_ldpruner(
    text_to_image: Pipeline, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ldpruner.prune(text_to_image, plan=small_plan(text_to_image.pipe))
    url = given.push_to_hub("org/portable", commit_message="The first one")
    assert url == f"{hub.url}/org/portable/commit/{hub.repos['org/portable'].branches['main']}"
    assert hub.repos["org/portable"].messages == ["The first one"]
    assert "unet/ldpruner_v1.py" in hub.repos["org/portable"].files()

    generator = torch.Generator().manual_seed(1)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in INPUTS["text-to-image"].items()}, tmp_path / "inputs"
    )
    for name, value in online_environment(hub.url).items():
        monkeypatch.setenv(name, value)
    job = {"class": "DiffusionPipeline", "folder": "org/portable", "inputs": str(tmp_path / "inputs"), "resave": None}
    jobs = {"untrusted": {**job, "options": {}}, "trusted": {**job, "options": {"trust_remote_code": True}}}
    (tmp_path / "child").mkdir()
    child = run_child(WITHOUT_US, jobs, tmp_path / "child")
    assert "contains custom code in ldpruner_v1.py" in child.error("untrusted")
    assert torch.equal(child.output("trusted"), output_of(given.denoiser, load_file(tmp_path / "inputs")))
    assert child.report["trusted"] == {"class": "UNet2DConditionModel", "stock": True}

    loaded = ldpruner.load("org/portable")
    assert same(loaded.denoiser, given.denoiser)
    assert torch.equal(loaded.latents(PROBE), given.pipeline.around(given.denoiser).latents(PROBE))


def test_a_plugin_pipeline_comes_back_from_the_hub(pruned: Pruned, folder: Path, hub: Hub, command: Command) -> None:
    code, out, err = command("push", folder, "org/plugin", "--private", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["repo"] == "org/plugin"
    assert told["url"].startswith(f"{hub.url}/org/plugin/commit/")
    assert set(told["files"]) == set(hub.repos["org/plugin"].files())
    assert hub.repos["org/plugin"].private
    assert ".ldpruner" not in told["files"], "our mark is for this machine"

    loaded = DiffusionPipeline.from_pretrained("org/plugin")
    assert same(loaded.unet, pruned.denoiser)
    ours = ldpruner.load("org/plugin")
    assert same(ours.denoiser, pruned.denoiser)
    assert ours.folder is not None
    assert set(ours.own_files()) == {"prompts.txt"}, "what diffusers does not fetch, ldpruner does"
    assert (ours.folder / "record.json").is_file()


@pytest.mark.usefixtures("usual_calls")
def test_a_plan_is_shared_in_kilobytes(pruned: Pruned, hub: Hub, command: Command, tmp_path: Path) -> None:
    given = pruned
    given.plan.push_to_hub("org/plan", base_model="org/base")
    files = hub.repos["org/plan"].files()
    assert set(files) == {PLAN, "README.md"}
    assert sum(map(len, files.values())) < 20_000
    assert Plan.from_pretrained("org/plan") == given.plan
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "ldpruner",
        "base_model": "org/base",
        "tags": ["ldpruner", "pruning", "pruning-plan"],
    }
    assert "ldpruner prune org/base --plan org/plan --out" in card.text
    assert all(f"`{edit.operator}` | {edit.replacement}" in card.text for edit in given.plan.edits)

    tiny_ldm().save_pretrained(tmp_path / "base")
    code, out, err = command("prune", tmp_path / "base", "--plan", "org/plan", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["edits"] == len(given.plan.edits)
    assert same(ldpruner.load(tmp_path / "out").denoiser, given.denoiser)
    assert ldpruner.prune(tmp_path / "base", plan="org/plan").plan == given.plan


def test_a_plan_in_a_folder(pruned: Pruned, tmp_path: Path) -> None:
    plan = pruned.plan
    plan.save_pretrained(tmp_path / "plan")
    assert Plan.from_pretrained(tmp_path / "plan") == Plan.from_pretrained(tmp_path / "plan" / PLAN) == plan
    (tmp_path / "plan" / "README.md").write_text("My own words.", encoding="utf-8")
    plan.save_pretrained(tmp_path / "plan")
    assert (tmp_path / "plan" / "README.md").read_text(encoding="utf-8") == "My own words."
    with pytest.raises(PlanError, match=r"no/where\.json: is no plan \(No such file or directory\)"):
        Plan.from_pretrained("no/where.json")


def test_a_plan_alone_from_a_saved_folder_and_from_its_file(folder: Path, hub: Hub, command: Command) -> None:
    for number, source in enumerate([folder, folder / PLAN]):
        code, out, err = command("push", source, f"org/alone-{number}", "--plan-only", "--revision", "trial")
        assert code == 0, err
        assert f"ldpruner prune MODEL --plan org/alone-{number} --out DIR" in out
        repo = hub.repos[f"org/alone-{number}"]
        assert set(repo.files("trial")) == {PLAN, "README.md"}
        assert repo.files("main") == {}
        assert Plan.from_pretrained(f"org/alone-{number}", revision="trial") == Plan.load(folder / PLAN)


def test_a_plan_leaves_the_card_of_a_pipeline_alone(folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    sharing.push(cards.shareable(folder, "org/both"), "org/both")
    card = hub.repos["org/both"].files()["README.md"]
    Plan.load(folder / PLAN).push_to_hub("org/both")
    assert hub.repos["org/both"].files()["README.md"] == card
    assert "org/both: the README.md that is there is not one of these, and stays." in caplog.text


def test_pushing_again_takes_away_what_is_left_over_and_keeps_what_a_user_wrote(pruned: Pruned, folder: Path, hub: Hub) -> None:
    pruned.push_to_hub("org/again")  # portable
    repo = hub.repos["org/again"]
    there = dict(repo.files())
    assert "unet/ldpruner_v1.py" in there
    card = there["README.md"].decode()
    there["README.md"] = (card.replace("---\n", "---\nlanguage: en\n", 1) + "\nSeen on my phone: it works.\n").encode()
    there["unet/diffusion_pytorch_model.fp16.safetensors"] = b"of another model"
    there |= {"notes.txt": b"mine", "evaluation.json": b"of another model"}
    repo.commit("main", there, "by hand")
    sharing.push(cards.shareable(folder, "org/again"), "org/again")
    files = repo.files()
    assert "unet/ldpruner_v1.py" not in files
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in files
    assert "evaluation.json" not in files
    assert files["notes.txt"] == b"mine"
    kept = files["README.md"].decode()
    assert kept.endswith(f"{MARKER}\n\nSeen on my phone: it works.\n")
    assert ModelCard(kept).data.to_dict()["language"] == "en"
    assert "This is the plugin form" in kept
    before = len(repo.messages)
    sharing.push(cards.shareable(folder, "org/again"), "org/again")
    assert len(repo.messages) == before, "nothing changed, so there is no commit"


def test_a_pull_request_leaves_main_alone(folder: Path, hub: Hub) -> None:
    hub.repos["org/asked"] = Repo()
    url = Plan.load(folder / PLAN).push_to_hub("org/asked", create_pr=True)
    assert url == f"{hub.url}/org/asked/discussions/1"
    assert hub.repos["org/asked"].files() == {}
    assert set(hub.repos["org/asked"].files("refs/pr/1")) == {PLAN, "README.md"}
    with pytest.raises(HubError, match="a pull request goes to main"):
        sharing.push({"a": "b"}, "org/asked", revision="other", create_pr=True)


def test_no_path_of_this_machine_is_told(ldm_folder: Path, pruned: Pruned, hub: Hub, tmp_path: Path) -> None:
    ldpruner.prune(ldm_folder, plan=pruned.plan).save_pretrained(tmp_path / "out")
    here = {path.name for path in (tmp_path / "out").rglob("*.json") if str(tmp_path) in path.read_text(encoding="utf-8")}
    assert here == {"record.json", "model_index.json", "config.json"}
    sharing.push(cards.shareable(tmp_path / "out", "org/discreet"), "org/discreet")
    files = hub.repos["org/discreet"].files()
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert json.loads(files["record.json"])["base"] == "tiny-ldm"
    assert b"from `tiny-ldm`" in files["README.md"]
    assert same(ldpruner.load("org/discreet").denoiser, ldpruner.load(tmp_path / "out").denoiser)


def test_a_card_names_the_licence_of_a_base_model_on_the_hub(pruned: Pruned, hub: Hub, tmp_path: Path) -> None:
    card = (
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny\npipeline_tag: image-to-image\n---\nBase."
    )
    hub.repos["org/base"] = Repo()
    hub.repos["org/base"].commit("main", {"README.md": card.encode()}, "first")
    given = pruned
    moved = replace(given, pipeline=Pipeline(given.pipeline.pipe, source="org/base"))
    moved.save_pretrained(tmp_path / "out")
    said = ModelCard.load(tmp_path / "out" / "README.md")
    assert said.data.to_dict() == {
        "library_name": "diffusers",
        "base_model": "org/base",
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.org/tiny",
        "pipeline_tag": "image-to-image",
        "tags": ["ldpruner", "pruning"],
    }
    assert "[org/base](https://huggingface.co/org/base)" in said.text
    assert "tiny ([text](https://example.org/tiny)). The terms of the base model hold" in said.text


UNSEEN = "or it is private, and no token was sent. Log in with `hf auth login`, or set HF_TOKEN"


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("push", "DIR", "org/new"), None, "org/new: the Hub wants a token. Log in with `hf auth login`, or set HF_TOKEN."),
        (
            ("push", "DIR", "org/new"),
            "wrong",
            "org/new: the Hub does not accept this token. Log in with `hf auth login`, or set HF_TOKEN.",
        ),
        (
            ("push", "DIR", "org/new"),
            READS,
            "org/new: this token may not do that (You don't have the rights to create a model under",
        ),
        (("push", "DIR", "new"), WRITES, "new: is no hub id. Say org/name, with letters, digits, dots, dashes and underscores."),
        (("push", "DIR/scheduler", "org/new"), WRITES, "DIR/scheduler: is no folder that ldpruner saved (no record.json beside a"),
        (("push", f"DIR/{PLAN}", "org/new"), WRITES, f"DIR/{PLAN}: is a file. A plan's file goes with --plan-only."),
        (("push", "DIR/none", "org/new", "--plan-only"), WRITES, "DIR/none: is no plan (No such file or directory)."),
        (("push", "DIR", "org/new", "--create-pr", "--revision", "a"), WRITES, "org/new: a pull request goes to main. Leave out"),
        (
            ("inspect", "org/none"),
            READS,
            "org/none: cannot be loaded (there is no such repository on the Hub, or this token may not",
        ),
        (("inspect", "org/none"), None, f"org/none: cannot be loaded (there is no such repository on the Hub, {UNSEEN})."),
        (("inspect", "org/none"), "wrong", "org/none: cannot be loaded (the Hub does not accept this token. Log in"),
        (("inspect", "org/plain"), READS, "org/plain: cannot be loaded (has no file model_index.json)."),
        (
            ("inspect", "org/plain", "--revision", "a"),
            READS,
            "org/plain: cannot be loaded (has no such revision. Name a branch, a tag",
        ),
        (
            ("prune", "DIR", "--out", "out", "--plan", "org/none"),
            READS,
            "org/none: there is no such repository on the Hub, or this token",
        ),
        (("prune", "DIR", "--out", "out", "--plan", "org/plain"), READS, f"org/plain: has no file {PLAN}."),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    arguments: tuple[str, ...],
    token: str | None,
    message: str,
    folder: Path,
    hub: Hub,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hub.repos["org/plain"] = Repo()
    monkeypatch.chdir(tmp_path)
    go_online(monkeypatch, hub.url, tmp_path / "hub", token=token)
    code, out, err = command(*(word.replace("DIR", str(folder)) for word in arguments))
    assert (code, out) == (2, "")
    assert the_line(err).startswith(message.replace("DIR", str(folder)))
    assert not (tmp_path / "out").exists()


ASKING: dict[str, Any] = {
    "push": lambda folder: ("push", folder, "org/new"),
    "plan": lambda folder: ("prune", folder, "--out", "out", "--plan", "org/new"),
    "load": lambda _: ("inspect", "org/new"),
}


@pytest.mark.parametrize("asked", ASKING)
def test_a_hub_out_of_reach_is_one_line(
    asked: str, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_online(monkeypatch, NOWHERE, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries six times, for 23 s
    code, out, err = command(*ASKING[asked](folder))
    assert (code, out) == (2, "")
    assert f"the Hub cannot be reached at {NOWHERE}. Check the connection, or HF_ENDPOINT" in the_line(err)


@pytest.mark.parametrize("asked", ASKING)
def test_offline_is_one_line(asked: str, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    code, out, err = command(*ASKING[asked](folder))
    assert (code, out) == (2, "")
    assert "HF_HUB_OFFLINE is set, and it is not in the local cache. Unset it, or give a folder" in the_line(err)
    assert len(hub.asked) == before


def test_what_is_in_the_cache_loads_offline(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    sharing.push(cards.shareable(folder, "org/cached"), "org/cached")
    first = ldpruner.load("org/cached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    again = ldpruner.load("org/cached")
    assert same(first.denoiser, again.denoiser)
    assert first.folder == again.folder
    assert Plan.from_pretrained("org/cached") == Plan.load(folder / PLAN)
    assert len(hub.asked) == before
