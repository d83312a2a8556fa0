"""What the README and the docs show is true: every command parses, every named file is there."""

import ast
import functools
import importlib
import inspect
import math
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import commands as commands_of
import pages
import pytest
import tyro
from pages import PAGES, ROOT

import arcface_jax
from arcface_jax import cli
from arcface_jax import config as configs
from arcface_jax.config import Config, command_line, loading
from arcface_jax.errors import ConfigError
from arcface_jax.training import validation

RECIPES = sorted((ROOT / "configs").glob("*.py"))
# Shell words that need no check of ours.
SHELL = {"export", "cd", "trap", "wait", "exit", "[", "scontrol", "xprof", "echo", "shift"}
NAMED_FILE = re.compile(r"(tests|scripts|configs|arcface_jax)/[\w./]+$")
PLACEHOLDERS = {"RECIPE": "demo", "my_recipe.py": "demo"}


class Parsed(BaseException):
    """A command line was parsed, and nothing of the command has run."""

    def __init__(self, arguments: Any = None):
        self.arguments = arguments


@pytest.fixture(autouse=True)
def _parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops every command when its words are parsed."""
    parse, call = command_line.parse, command_line.call_subcommand

    def parse_only(*arguments: Any, **options: Any) -> None:
        raise Parsed(parse(*arguments, **options))

    def call_nothing(functions: dict[str, Callable], *arguments: Any, **options: Any) -> None:
        call({name: stopped(body) for name, body in functions.items()}, *arguments, **options)

    monkeypatch.setattr(command_line, "parse", parse_only)
    monkeypatch.setattr(command_line, "call_subcommand", call_nothing)


def stopped(body: Callable) -> Callable:
    """A function of the same signature that does nothing."""

    @functools.wraps(body)
    def stop(*_: Any, **__: Any) -> None:
        raise Parsed

    return stop


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_of_the_page_parses(page: Path):
    for command in pages.commands(page):
        if command.words[0] in SHELL or re.match(r"\w+=", command.words[0]):
            continue
        try:
            check(command.words, is_plugin="mypkg" in command.line)
        except (SystemExit, AssertionError, ConfigError) as error:
            pytest.fail(f"{page.name}: {command.line}: {error!r}")


def test_the_commands_of_the_recipes_parse():
    shapes = set()
    for recipe in RECIPES:
        docstring = ast.get_docstring(ast.parse(recipe.read_text())) or ""
        shown = re.findall(
            r"^ *(python scripts/train.py .*)$", docstring.replace("\\\n", " "), re.MULTILINE
        )
        assert shown, recipe.name
        for line in shown:
            words = shlex.split(line)
            assert words[2] == f"configs/{recipe.name}"
            shape = tuple(word for word in words if word.startswith("--"))
            if shape not in shapes:  # the values are folders, and each takes a while to parse
                check(words)
            shapes.add(shape)


def check(words: Sequence[str], *, is_plugin: bool = False) -> None:
    """Hands words to the program that they name, which parses them and runs nothing."""
    program, *rest = [PLACEHOLDERS.get(word, word) for word in words]
    program = program.rpartition("/")[2]
    if program.endswith("python"):
        return check_python(rest)
    if rest[:1] == ["import"] and rest[1] not in ("torch", "onnx", "centers"):
        # The content of the file would tell.
        kind = ["onnx", "--onnx"] if rest[1].endswith(".onnx") else ["torch", "--weight"]
        rest[1:1] = kind
    known = {"arcface-jax": cli.main, "make": check_make, "pip": check_pip, "pytest": check_paths}
    assert program in known, f"no check for {program}"
    with pytest.raises(Parsed) as parsed:
        known[program](rest)
    if isinstance(parsed.value.arguments, Config) and not is_plugin:
        check_config(parsed.value.arguments)


def check_python(words: Sequence[str]) -> None:
    """A script of the checkout, or a module."""
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "benchmarks":
            measurements = vars(importlib.import_module("benchmarks.__main__")).items()
            functions = {
                name.removeprefix("run_").replace("_", "-"): stopped(body)
                for name, body in measurements
                if name.startswith("run_")
            }
            main = functools.partial(tyro.extras.subcommand_cli_from_dict, functions)
            return check_tyro(main, rest)
        assert (
            module in ("venv", "hatchling")
            or (ROOT / module.replace(".", "/")).exists()
            or (ROOT / f"{module.replace('.', '/')}.py").exists()
        ), module
        return None
    if words[0] == "-c":
        return compile(words[1], "page", "exec") and None
    path = ROOT / words[0]
    assert path.is_file(), words[0]
    if path.parent.name != "scripts":
        return None
    main = commands_of.script(path.stem).main
    if "words" in inspect.signature(main).parameters:
        with pytest.raises(Parsed) as parsed:
            main([PLACEHOLDERS.get(word, word) for word in words[1:]])
        if isinstance(parsed.value.arguments, Config):
            check_config(parsed.value.arguments)
        return None
    return check_tyro(functools.partial(tyro.cli, stopped(main)), words[1:])


def check_tyro(main: Callable, words: Sequence[str]) -> None:
    with pytest.raises(Parsed):
        main(args=list(words))


def check_config(config: Config) -> None:
    """A run of these settings would start, if its data were there."""
    devices = config.devices or math.gcd(8, configs.batch_norm_groups(config))
    path = config.data.path or "data"
    init = config.init_from or "weights.onnx" * (config.finetune.centers != "random")
    complete = {"workdir": "runs/x", "data__path": path, "init_from": init, "devices": devices}
    validation.validate(configs.replace(config, **complete), num_devices=devices)


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets, words
    raise Parsed


def check_pip(words: Sequence[str]) -> None:
    """Every extra that is asked for exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|arcface-jax)\[([\w,-]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert extra in project["optional-dependencies"], extra
    raise Parsed


def check_paths(words: Sequence[str]) -> None:
    for word in words:
        if "/" in word:
            assert (ROOT / word.partition("::")[0]).exists(), word
    raise Parsed


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_the_text_names_exists(page: Path):
    if page.name == "changelog.md":
        return
    for span in pages.inline(page):
        words = span.split()
        if words[0] == "arcface-jax" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1].strip(",.") in cli.COMMANDS or words[1] == "COMMAND", span
        elif words[0] == "make" and len(words) > 1:
            with pytest.raises(Parsed):
                check_make(words[1:])
        elif words[0] == "pytest" or re.match(
            r"(tests|scripts|configs|arcface_jax)/[\w./]+$", span
        ):
            with pytest.raises(Parsed):
                check_paths([word.rstrip(",.") for word in words])


def test_the_extras_of_the_install_page_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in page or f"[{extra}" in page or f",{extra}" in page, extra


def test_the_pictures_are_what_the_script_draws(tmp_path: Path):
    script = commands_of.script("pictures")
    assert script.main(output=tmp_path) == 0
    for drawn in tmp_path.iterdir():
        kept = ROOT / "docs" / "images" / drawn.name
        assert drawn.read_text() == kept.read_text(), f"{drawn.name}: run scripts/pictures.py"


def test_the_parser_of_the_pages_sees_what_is_wrong():
    for line in (
        "arcface-jax train demo --data.pth x",
        "arcface-jax train demoo",
        "arcface-jax data packk FOLDER OUTPUT",
        "make demoo",
        "pip install '.[cuda99]'",
        "arcface-jax train demo --data.global-batch-size 50 --model.bn-batch-size 20",
    ):
        with pytest.raises((SystemExit, AssertionError, ConfigError)):
            check(shlex.split(line))
    assert loading.read_recipe("demo")  # and the recipe itself is fine


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_python_of_the_page_compiles(page: Path):
    for text in pages.blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_the_python_of_the_page_imports_exists(page: Path):
    for text in pages.blocks(page, "python"):
        tree, modules = ast.parse(text), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arcface_jax"):
                for alias in node.names:
                    found = imported(node.module or "", alias.name)
                    if inspect.ismodule(found):
                        modules[alias.asname or alias.name] = found
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), ast.unparse(node)


def imported(module: str, name: str) -> Any:
    """What `from module import name` binds."""
    found = importlib.import_module(module)
    return (
        getattr(found, name)
        if hasattr(found, name)
        else importlib.import_module(f"{module}.{name}")
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_every_link_leads_somewhere(page: Path):
    """Of the files that mkdocs does not check."""
    text = page.read_text()
    targets = re.findall(r'(?:\]\(|src="|srcset=")([^)"\s]+)', text)
    for target in targets:
        file, _, anchor = target.partition("#")
        file = file or page.name
        assert (page.parent / file).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / file).read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert anchor in slugs, target


def test_the_site_has_every_page_and_links_stay_in_it():
    """What `mkdocs build --strict` refuses first."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f"{page.relative_to(ROOT / 'docs')}\n" in navigation, f"{page} is not in mkdocs.yml"
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            inside = (page.parent / target).resolve().is_relative_to(ROOT / "docs")
            assert inside or "://" in target, f"{page}: {target} is not part of the site"


def test_the_release_has_one_number():
    version = arcface_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_every_python_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert re.findall(r'python: "(3\.\d+)", jax', workflow) == promised
    shown = re.findall(r"^ *(arcface-jax demo .*|make [\w-]+)$", workflow, re.MULTILINE)
    for line in shown:
        check(shlex.split(line))
    assert shown
