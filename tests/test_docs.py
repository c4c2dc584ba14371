"""What README and docs/ name exists: options, groups, files, functions, messages. A page that the code outgrew fails."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import textwrap
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_dapo.collected import DropReason
from nemo_dapo.config import RunConfig, compose_file, register, typed, validate, validate_evaluation
from nemo_dapo.config.model_family import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
SECTIONS = [option.name for option in fields(RunConfig)]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")

register()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> list[str]:
    """Fenced blocks and `inline code`; prose may say what it likes."""
    text = page.read_text()
    return [block for _, block in FENCE.findall(text)] + CODE.findall(FENCE.sub("", text))


def is_option(name: str) -> bool:
    """Whether the schema has `name`, a dotted path; below a mapping of plain values anything goes."""
    kind: typing.Any = RunConfig
    for part in name.split("."):
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not typing.Any:
            return False
        if kind is None:
            return False
    return True


@cache
def definitions(module: str) -> set[str]:
    """Names that nemo_dapo.`module` defines, methods as Class.method; read, not imported: Megatron takes 20 s."""
    file = ROOT / "nemo_dapo" / Path(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return set()
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def is_definition(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in definitions(".".join(parts[:i])) for i in range(1, len(parts)))


def values_set(code: str) -> list[str]:
    """Names on the left of `=`: options and groups, on a command line."""
    return re.findall(r"(?<![\w./-])\+?([a-z_]+(?:\.[\w-]+)*)=", code)


@cache
def texts_in_the_code() -> tuple[str, ...]:
    """Constant parts of every string but docstrings; adjacent literals are joined as Python joins them."""
    files = [*(ROOT / "nemo_dapo").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
    return tuple(node.value for node in strings if isinstance(node.value, str))


@every_page
def test_every_option_that_is_set_exists(page: Path) -> None:
    wrong = [name for code in code_of(page) for name in values_set(code) if "." in name and not is_option(name)]
    assert not wrong


@every_page
def test_every_option_or_function_named_in_code_exists(page: Path) -> None:
    dotted = re.compile(rf"(?:{'|'.join(SECTIONS)}|sampling|loss|megatron|batching)(?:\.\w+)+")
    named = [code for code in code_of(page) if dotted.fullmatch(code) and not code.endswith((".py", ".jsonl", ".json"))]
    assert not [name for name in named if not is_option(name) and not is_definition(name)]


@every_page
def test_every_choice_of_a_group_is_a_file(page: Path) -> None:
    choices = re.compile(rf"(?<![\w.+])({'|'.join(GROUPS)})=(\[[\w,]+\]|\w+)(?!\w*[.:])")
    for code in code_of(page):
        for group, chosen in choices.findall(code):
            for one in chosen.strip("[]").split(","):
                assert (ROOT / "conf" / group / f"{one}.yaml").is_file() or one == "first", f"{group}={one}"


@every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    rooms = "nemo_dapo|conf|examples|tests|docs|requirements|benchmarks"
    named = re.compile(rf"(?<![\w./<>-])(?:(?:{rooms})/[\w./*-]*|test_\w+\.py)")
    for code in code_of(page):
        for name in named.findall(code):
            place = ROOT / "tests" / name if name.startswith("test_") else ROOT / name.rstrip(".")
            written_by_the_reader = place.name == "first.yaml"
            assert written_by_the_reader or place.exists() or list(ROOT.glob(name)), name


@every_page
def test_every_metric_that_is_named_is_recorded(page: Path) -> None:
    named = {name for code in code_of(page) for name in re.findall(r"(?<![\w/])(?:rollout|train|memory)/\w+", code)}
    reasons = {f"rollout/dropped_{reason.value}" for reason in DropReason}
    of_updates = {f"train/{name}" for name in texts_in_the_code()}
    assert named <= {*texts_in_the_code(), *reasons, *of_updates}


def test_the_page_of_metrics_names_every_one_that_is_recorded() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    whole = re.compile(r"(?:rollout|time|memory|eval)/\w*[a-z]")  # not the beginning of one, as of rollout/age_0
    recorded = {text for text in texts_in_the_code() if whole.fullmatch(text)}
    timed = {
        name for file in (ROOT / "nemo_dapo").glob("*.py") for name in re.findall(r'timed\("(\w+)"', file.read_text())
    }
    recorded |= {f"rollout/dropped_{reason.value}" for reason in DropReason} | {f"time/{name}" for name in timed}
    assert len(recorded) > 30
    assert not [name for name in recorded if f"`{name}`" not in text]


@every_page
def test_every_make_target_that_is_named_has_a_rule(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {name for code in code_of(page) for name in re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)}
    assert not [name for name in named if not re.search(rf"^{name}:.*\n(?=\t|$)|^{name}: \S", makefile, re.MULTILINE)]


@every_page
def test_links_to_files_of_the_repository_lead_somewhere(page: Path) -> None:
    if page.parent == ROOT:  # those within docs/ are checked by mkdocs --strict
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert not [target for target in targets if not (ROOT / target).exists()]


@every_page
def test_python_and_yaml_blocks_can_be_read(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(textwrap.dedent(block))
        if language == "yaml":
            assert OmegaConf.create(textwrap.dedent(block))


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a fenced block that starts one of our scripts; a `…` stands for more of them."""
    lines = "\n".join(block for _, block in FENCE.findall(page.read_text())).replace("\\\n", " ").splitlines()
    scripts = ("examples/train_dapo.py", "examples/evaluate.py", "colocated.sbatch", "dedicated.sbatch")
    return [shlex.split(line.replace("…", "")) for line in lines if any(script in line for script in scripts)]


def ranks(words: list[str]) -> int:
    """How many a command starts; a job file one a GPU, of which it asks for 8 a node."""
    options = ("--nnodes", "--nproc-per-node", "--nodes")
    counts = [int(words[words.index(option) + 1]) for option in options if option in words]
    if any(word.endswith(".sbatch") for word in words) and "--gpus-per-node=0" not in words:
        counts.append(8)
    return math.prod(counts)


@every_page
def test_every_command_would_pass_the_checks_of_its_options(page: Path, large_model: Path) -> None:
    for words in commands(page):
        script = next(i for i, word in enumerate(words) if word.startswith("examples/"))
        given = [word for word in words[script + 1 :] if "=" in word and not word.startswith("evaluation.checkpoint")]
        is_training = "evaluate" not in words[script]
        yaml = ROOT / "conf" / ("config.yaml" if is_training else "evaluate.yaml")
        config = typed(compose_file(yaml, [*given, f"model.path={large_model}"]))
        (validate if is_training else validate_evaluation)(config, ranks(words))


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checks read config.json alone; this one is Qwen2.5-32B's."""
    folder = tmp_path_factory.mktemp("Qwen2.5-32B")
    sizes = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 64}
    rest = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "max_position_embeddings": 131072}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes, **rest}))
    return folder


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = next(block for _, block in FENCE.findall((ROOT / "README.md").read_text()) if "algorithm.py" in block)
    folders: list[str] = []
    named = set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip(), maxsplit=1)[0].split() if depth < 3 else []:
            path = Path(*folders[:depth], name)
            assert (ROOT / path).exists(), path
            named.add(path)
            if name.endswith("/"):
                folders = [*folders[:depth], name]
    here = {path.relative_to(ROOT) for path in (ROOT / "nemo_dapo").iterdir() if not path.name.startswith("__")}
    missing = sorted(map(str, here - named))
    assert not missing


def test_the_readme_lists_the_models_that_train() -> None:
    named = set(re.findall(r"`(\w+ForCausalLM)`", (ROOT / "README.md").read_text()))
    assert named == {family.architecture for family in FAMILIES.values()}


def test_messages_in_the_troubleshooting_page_are_the_codes_own_words() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = page.partition("## Words of others")[0]
    headings = "\n".join(re.findall(r"^### (.*)$", ours, re.MULTILINE))
    quoted = [message for message in CODE.findall(headings) if " " in message or message.endswith(":")]
    assert len(quoted) > 20, "the pattern for headings finds nothing"
    parts = [part.strip() for message in quoted for part in re.split("…|[0-9]+(?:/[0-9]+)?", message)]
    missing = [part for part in parts if part and not any(part in text for text in texts_in_the_code())]
    assert not missing
