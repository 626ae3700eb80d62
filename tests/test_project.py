"""The promises of the project itself: one file of pins, true pages, imports in one direction, small files."""

import ast
import importlib.metadata
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import build
import pytest
import yaml
from jinja2 import UndefinedError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from torch.distributed.run import get_args_parser

from minivlm import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minivlm"
READING_PATH = ("config", "placeholders", "vision", "projector", "model", "processor", "train")
DOCS = ROOT / "docs"
MODULES = sorted(PACKAGE.rglob("*.py"))
LESSONS = sorted((ROOT / "notebooks/lessons").rglob("*.py"))
OURS = [*MODULES, *LESSONS]
PAGES = ["README.md", "README.zh.md", "notebooks/README.md", "data/README.md"]
PAGES += sorted(f"docs/{file.name}" for file in DOCS.glob("*.md"))
LINES = {  # at most, docstrings and blank lines counted
    "minivlm": 10_900,
    "minivlm without scenes": 7_900,
    "reading path": 1_400,
    "lessons": 6_900,
    "tests": 14_000,
    "benchmarks": 2_000,
}
INSTALLERS = ("environment.yml", "Makefile", ".ci/run", ".github/workflows/test.yml")
LENIENT = {"strict", "weights_only"}
PASSED_ON = {"VENV", "PYTHON", "TORCH_INDEX", "ARGS", "OMP_NUM_THREADS"}  # by a make to what it runs
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
# Import names that differ from the names of what is installed.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "IPython": "ipython", "yaml": "pyyaml"}


def read(name: str) -> str:
    """A file of the project as text."""
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    """Name -> exact version, from constraints.txt."""
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in matches}


def project() -> dict:
    """pyproject.toml."""
    return tomllib.loads(read("pyproject.toml"))


def declared(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml asks for: the base dependencies and those of the extras named."""
    table = project()["project"]
    lines = table["dependencies"] + [line for extra in extras for line in table["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def git_files() -> list[Path]:
    """Every file that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def make(*arguments: str) -> subprocess.CompletedProcess:
    """Run make, without the variables of a make that may be running these tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    clean = {name: value for name, value in clean.items() if name not in PASSED_ON}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)


class TestVersions:
    def test_constraints_are_the_only_exact_pins_and_cover_what_is_asked_for(self):
        requirements = declared("course", "test")
        backend = [Requirement(line) for line in project()["build-system"]["requires"]]
        for name, requirement in [*requirements.items(), *((canonicalize_name(r.name), r) for r in backend)]:
            assert {part.operator for part in requirement.specifier} == {">="}, f"{name}: a lower bound, no more"
            assert requirement.specifier.contains(pins()[name]), f"{name}: the pin is below the lower bound"
        for file in ("pyproject.toml", *INSTALLERS, "README.md"):
            assert not re.findall(r"[a-z]==\d", read(file)), f"{file} pins a version; only constraints.txt may"

    def test_environment_yml(self):
        conda = yaml.safe_load(read("environment.yml"))
        assert conda["name"] == "minivlm"
        assert {"python=3.11", "pip"} <= {entry for entry in conda["dependencies"] if isinstance(entry, str)}
        pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
        assert pip == [f"--extra-index-url {TORCH_CPU}", "-c constraints.txt", "-e .[course]"]

    def test_what_is_installed_here_is_what_is_pinned(self):
        installed = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
        needed = set(pins()) & set(declared("course", "test"))
        assert needed <= set(installed)
        for name in needed:
            assert installed[name].version.split("+")[0] == pins()[name]
        assert "minivlm" in installed, "install the project itself: make environment"
        assert installed["minivlm"].version == project()["project"]["version"]

    def test_every_pin_runs_on_python_3_11_0(self):
        installed = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
        promised = project()["project"]["requires-python"]
        assert promised == ">=3.11"
        wants = {name: installed[name].metadata["Requires-Python"] or "" for name in pins() if name in installed}
        assert {name: want for name, want in wants.items() if "3.11.0" not in SpecifierSet(want)} == {}

    def test_everything_installed_that_we_need_is_pinned(self):
        """Follow the requirements of what we ask for; each one that is met has a pin."""
        queue, checked = list(declared("course", "test").values()), set()
        while queue:
            requirement = queue.pop()
            name = canonicalize_name(requirement.name)
            if name in checked or name.startswith(("nvidia-", "cuda-")) or name == "triton":  # torch pins these itself
                continue
            checked.add(name)
            for line in importlib.metadata.requires(name) or []:
                child = Requirement(line)
                if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                    queue.append(child)
        assert checked - set(pins()) == set()

    def test_dependencies_are_what_the_code_imports(self):
        assert third_party(MODULES) == set(declared())
        assert third_party(LESSONS) <= set(declared("course"))
        assert third_party((ROOT / "tests").rglob("*.py")) <= {*declared("course", "test"), "packaging"}


def test_importing_the_package_imports_nothing_that_only_some_commands_need():
    program = "import sys, minivlm; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"datasets", "pyarrow", "pandas", "peft", "matplotlib", "sklearn", "IPython", "ipywidgets"}
    assert set(done.stdout.split()) & heavy == set()


def third_party(files) -> set[str]:
    """The distributions that these files import, the standard library and ourselves left out."""
    ours = {"minivlm", "lessons", "tests", "build", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    tops = {name.split(".")[0] for path in files for name, _ in imports(path)} - ours - set(sys.stdlib_module_names)
    return {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in tops}


def imports(path: Path) -> set[tuple[str, int]]:
    """(dotted name, line) of all that a file imports, at any depth; `from a import b` counts as `a` and `a.b`."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            result |= {(name, node.lineno) for name in names}
    return result


class TestMake:
    def test_ci_run_is_executable(self):
        assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR
        assert read(".ci/run").startswith("#!/usr/bin/env bash\n")
        steps = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]["steps"]
        assert [step["run"] for step in steps if "run" in step] == [".ci/run"], "it installs through make"

    def test_readme_commands_exist(self):
        targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
        named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code_of_readme())))
        assert {"run", "test", "lab", "check"} <= named <= targets

    def test_readme_subcommands_exist(self, monkeypatch, capsys):
        from minivlm.cli import main

        monkeypatch.setattr(sys, "argv", ["minivlm", "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        shown = capsys.readouterr().out
        named = set(re.findall(r"\bminivlm ([a-z]+)", "\n".join(code_of_readme())))
        commands = {"run", "train", "evaluate", "caption", "chat", "data", "base", "experiment", "export", "import"}
        assert named and named <= commands
        assert {name for name in commands if not re.search(rf"\b{name}\b", shown)} == set()

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            (
                'echo "Python 3.9.1"; test "$1" = --version',
                r"needs Python 3\.11 or newer.*3\.9\.1.*make … PYTHON=",
            ),
            ('case "$2" in *ensurepip*) exit 1;; esac', r"has no venv module.*apt install python3-venv"),
            ('test "$1" = -c', r"^(?!.*Installing)"),  # venv itself fails: nothing goes on after it
        ],
        ids=["too old", "no venv", "venv fails"],
    )
    def test_says_plainly_what_is_missing(self, tmp_path, script, message):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        python.chmod(0o755)
        done = make("environment", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert re.search(message, done.stdout, re.DOTALL), done.stdout + done.stderr
        assert not list(tmp_path.glob("venv/.minivlm-*")), "a failed environment must not count as complete"

    def test_torch_index_is_given_to_pip(self, tmp_path):
        commands = make("-n", "environment", f"TORCH_INDEX={TORCH_CPU}", f"VENV={tmp_path / 'venv'}").stdout
        assert f"--extra-index-url {TORCH_CPU} torch" in commands
        assert "index-url" not in make("-n", "environment", f"VENV={tmp_path / 'venv'}").stdout

    def test_a_complete_environment_is_left_alone(self, tmp_path):
        first = make("-n", "environment", f"VENV={tmp_path / 'venv'}").stdout
        stamp = Path(re.search(r"touch (\S+)", first)[1])
        stamp.parent.mkdir()
        stamp.touch()
        assert "pip" not in make("-n", "environment", f"VENV={tmp_path / 'venv'}").stdout


def code_of_readme() -> list[str]:
    """Every block and span of code in the README."""
    blocks = re.findall(r"^```.*?^```", read("README.md"), re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", read("README.md"), flags=re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`([^`\n]+)`", rest)


def readme_tree() -> list[tuple[int, str, str]]:
    """(depth, name, what it is) of each line of the README's tree, in order."""
    tree = next(block for block in code_of_readme() if "minivlm/ " in block and "Makefile " in block)
    lines = [re.fullmatch(r"( *)(\S+) {2,}(\S.*)", line) for line in tree.splitlines()[1:-1]]
    assert all(lines), "each line of the tree is a name and what it is"
    return [(len(line[1]) // 2, line[2], line[3]) for line in lines]


def words(*files: Path) -> int:
    """How many words some pages have, code and tables counted."""
    return sum(len(file.read_text(encoding="utf-8").split()) for file in files)


class TestPages:
    def test_tree_is_the_real_one(self):
        files = [path.relative_to(ROOT).parts for path in git_files()]
        top = {parts[0] + "/" * (len(parts) > 1) for parts in files}
        inside = {parts[1] + "/" * (len(parts) > 2) for parts in files if parts[0] == "minivlm"}
        assert {name for depth, name, _ in readme_tree() if depth == 0} == top
        assert {name for depth, name, _ in readme_tree() if depth == 1} == inside
        assert len(inside) <= 21

    def test_pages_are_short(self):
        assert words(ROOT / "README.md") <= 1800
        assert words(*DOCS.glob("*.md")) <= 7000

    @pytest.mark.parametrize("page", PAGES)
    def test_links_lead_somewhere(self, page):
        targets = re.findall(r"\]\(([^)#\s]+)", read(page)) + re.findall(r'src="([^"]+)"', read(page))
        folder = (ROOT / page).parent
        assert [name for name in targets if "://" not in name and not (folder / name).exists()] == []

    def test_every_page_is_what_its_template_and_the_results_make(self):
        pages = build.pages()
        assert {"README.md", "README.zh.md", "notebooks/README.md"} < set(pages) <= set(PAGES)
        assert [name for name, text in pages.items() if read(name) != text] == [], "run: python docs/build.py"

    def test_a_template_cannot_name_a_number_that_is_not_there(self, tmp_path, monkeypatch):
        (tmp_path / "README.md.j2").write_text("{{ measured.run.int4.minutes }}", encoding="utf-8")
        monkeypatch.setattr(build, "TEMPLATES", tmp_path)
        with pytest.raises(UndefinedError, match="int4"):
            build.pages()

    def test_the_chinese_page_has_the_same_commands_and_slots(self):
        def commands(page: str) -> list[str]:
            blocks = re.findall(r"^```(?:sh|bat|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
            return [line.split("#")[0].strip() for line in "".join(blocks).splitlines() if line.split("#")[0].strip()]

        assert commands(read("README.zh.md")) == commands(read("README.md"))

    def test_commands_for_several_processes_are_understood(self, monkeypatch):
        """By torchrun's own parser what comes before `-m minivlm`, by ours what follows."""
        parsed, launched = [], []
        monkeypatch.setattr(cli, "_train", parsed.append)
        blocks = re.findall(r"^```.*?^```", read("docs/several_machines.md"), re.DOTALL | re.MULTILINE)
        for line in (line for block in blocks for line in block.splitlines() if " -m minivlm " in line):
            words = line.split()
            if words[0] == "torchrun":
                launch = get_args_parser().parse_args(words[1:])
                assert launch.module and launch.training_script == "minivlm"
                launched.append((launch.nnodes, launch.node_rank, launch.nproc_per_node))
                assert cli.main(launch.training_script_args) == 0
            else:
                assert words[:3] == ["python", "-m", "minivlm"] and cli.main(words[3:]) == 0
        assert launched == [("1:1", 0, "8"), ("2", 0, "8"), ("2", 1, "8")] and len(parsed) == 4
        for options in parsed:
            assert (options.stage, options.parent, options.out) == ("sft", Path("CHECKPOINT"), Path("FOLDER"))


def target_of(dotted: str) -> str | None:
    """The top-level module or folder of the package that a dotted name belongs to; "lessons" for the lessons."""
    parts = dotted.split(".")
    if parts[0] == "lessons":
        return "lessons"
    known = parts[0] == "minivlm" and len(parts) > 1 and list(PACKAGE.glob(f"{parts[1]}*"))
    return parts[1] if known else None


class TestImports:
    """The one direction of imports, as `docs/architecture.md` states it."""

    @pytest.mark.parametrize("name", READING_PATH)
    def test_the_reading_path_imports_from_few_folders(self, name):
        folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
        targets = {target_of(dotted) for dotted, _ in imports(PACKAGE / f"{name}.py")} & folders
        assert targets <= {"processor": {"data"}, "train": {"data", "runtime"}}.get(name, set())

    @pytest.mark.parametrize("folder", ["data", "runtime"])
    def test_what_the_reading_path_imports_does_not_import_it_back(self, folder):
        """At import time; for type checkers only is another matter."""
        for file in (PACKAGE / folder).glob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
            assert not modules & {"minivlm.processor", "minivlm.model", "minivlm.train", "minivlm.checkpoint"}

    def test_the_package_never_imports_the_lessons(self):
        importers = {path.name for path in MODULES for dotted, _ in imports(path) if target_of(dotted) == "lessons"}
        assert importers == set()

    def test_nobody_reads_another_modules_private_names(self):
        wrong = [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for path in (*MODULES, *LESSONS)
            for name, line in imports(path)
            if name.startswith(("minivlm.", "lessons.")) and re.search(r"\._[a-z]", name)
        ]
        assert wrong == []


def lines_of(path: Path) -> int:
    """How many lines a file has."""
    return len(path.read_text(encoding="utf-8").splitlines())


def docstring_lines(tree: ast.AST) -> set[int]:
    """The numbers of all lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(path: Path) -> set[int]:
    """The numbers of the lines that are code: no docstring, no comment, not blank."""
    text = path.read_text(encoding="utf-8")
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    return lines - docstring_lines(ast.parse(text))


def public(tree: ast.AST):
    """Public functions, classes and their public methods; helpers inside functions belong to those."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


class TestCode:
    def test_the_house_stays_small(self):
        tests = list((ROOT / "tests").rglob("*.py"))
        benchmarks = [path for path in tests if "benchmarks" in path.parts]
        groups = {
            "minivlm": MODULES,
            "minivlm without scenes": [path for path in MODULES if PACKAGE / "scenes" not in path.parents],
            "reading path": [PACKAGE / f"{name}.py" for name in READING_PATH],
            "lessons": LESSONS,
            "tests": [path for path in tests if path not in benchmarks],
            "benchmarks": benchmarks,
        }
        counts = {name: sum(map(lines_of, files)) for name, files in groups.items()}
        assert {name: count for name, count in counts.items() if not 0 < count <= LINES[name]} == {}

    def test_files_fit_into_a_head(self):
        drawing = PACKAGE / "scenes/drawing"
        long = {str(path.relative_to(ROOT)): lines_of(path) for path in OURS if lines_of(path) > 500}
        tables = {str(path.relative_to(ROOT)) for path in drawing.glob("*.py")}
        tests = {str(p.relative_to(ROOT)): lines_of(p) for p in (ROOT / "tests").rglob("*.py") if lines_of(p) > 800}
        assert {name: count for name, count in long.items() if name not in tables or count > 800} | tests == {}

    @pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_docstrings(self, path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), "a module says what it is"
        assert [f"{node.name}, line {node.lineno}" for node in public(tree) if not ast.get_docstring(node)] == []

    @pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_functions_fit_on_a_screen(self, path):
        code, tree = code_lines(path), ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        lengths = {node.name: len(code.intersection(range(node.lineno, node.end_lineno + 1))) for node in functions}
        assert {name: length for name, length in lengths.items() if length > 50} == {}

    def test_no_blanket_except_and_no_lenient_load(self):
        wrong = []
        for path in OURS:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ExceptHandler):
                    blanket = node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"}
                    silent = all(isinstance(line, ast.Pass) for line in node.body)
                    raises = any(isinstance(line, ast.Raise) for line in ast.walk(node))
                    wrong += [f"{path.name}:{node.lineno}: except"] * ((blanket and not raises) or silent)
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") != "zip":
                    false = [k.arg for k in node.keywords if getattr(k.value, "value", None) is False]
                    wrong += [f"{path.name}:{node.lineno}: {name}=False" for name in LENIENT.intersection(false)]
        assert wrong == []

    def test_no_machine_paths_no_package_hosts_nothing_left_to_do(self):
        # Put together from pieces, so that this file does not find itself.
        paths = ["/" + path for path in ("work/", "root/", "home/[a-z]", "tmp/", "opt/(?:py|wheels)", "Users/[a-z]")]
        hosts = [
            "py" + "pi.org",
            "python" + "hosted",
            "mirrors?" + r"\.[a-z]",
            "ana" + "conda.(?:org|com)",
            "dev" + "pi",
        ]
        left = [r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bX" + r"XX\b"]
        pattern = re.compile("|".join(rf"(?<![\w.]){path}" for path in paths) + "|" + "|".join(hosts + left))
        wrong = []
        for path in git_files():
            data = path.read_bytes()
            if b"\0" in data or path.suffix in {".png", ".safetensors"}:
                continue
            for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
                if match := pattern.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {match.group(0)}")
        assert wrong == []
