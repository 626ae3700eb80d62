"""JupyterLab on loopback, and a notebook in a real browser: what `test_browser.py` drives.

The browser is the system's own (Debian: `apt-get install chromium`), since nothing is downloaded here.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (  # no sandbox: CI runs as root; the others keep the browser from looking for anything outside
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
)
SECONDS = 60  # for a cell to finish: importing torch is the longest here

# no news, no tour, no questions; every cell is in the page, also those that are scrolled away
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that is running: its address, its token, and the folder that it shows."""

    address: str
    token: str
    folder: Path

    def link(self, name: str) -> str:
        return f"{self.address}/doc/tree/{name}.ipynb?token={self.token}"


@contextmanager
def running_lab(root: Path) -> Iterator[Lab]:
    """JupyterLab on a free port of loopback, showing a copy of the notebooks; ended whatever happens.

    Outputs are dropped from the copy: what a test sees was made while it looked.

    Raises:
        RuntimeError: it did not start; the message ends with its log.
    """
    folder = root / "notebooks"
    folder.mkdir()
    for file in NOTEBOOKS.glob("*.ipynb"):
        notebook = json.loads(file.read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        (folder / file.name).write_text(json.dumps(notebook), "utf-8")
    for name, values in SETTINGS.items():
        file = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), "utf-8")
    token, port, log_file = secrets.token_hex(16), _free_port(), root / "lab.log"
    lab = Lab(f"http://127.0.0.1:{port}", token, folder)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            _command(port), cwd=folder, env=_environment(root, token), stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(lab, process, log_file)
            yield lab
        finally:
            _end(process)


class NotebookPage:
    """One notebook, open in the browser: cells are found by what they say, and run by keyboard."""

    def __init__(self, page: Page, lab: Lab, name: str):
        self.page = page
        self.cells = ["".join(c["source"]) for c in json.loads((lab.folder / f"{name}.ipynb").read_text())["cells"]]
        page.goto(lab.link(name))
        expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(self.cells), timeout=30_000)
        expect(page.get_by_text(re.compile(r"\| Idle$"))).to_be_visible(timeout=30_000)

    def index_of(self, text: str) -> int:
        """The index of the one code cell whose source has this text."""
        indices = [i for i, source in enumerate(self.cells) if text in source]
        assert len(indices) == 1, f"{len(indices)} cells have the text {text!r}"
        return indices[0]

    def cell(self, text: str) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.index_of(text))

    def run(self, text: str, seconds: int = SECONDS) -> Locator:
        """Run a cell with Shift+Enter and wait until it has its number. Returns what it shows.

        Cells that were started before come first, and their time counts, too.
        """
        cell = self.cell(text)
        before = cell.locator(".jp-InputPrompt").inner_text()
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        done = re.compile(rf"^(?!{re.escape(before)}$)\[\d+\]:$")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(done, timeout=seconds * 1000)
        return cell.locator(".jp-OutputArea").first

    def run_above(self, text: str) -> None:
        self.cell(text).locator(".cm-content").click()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Above Selected Cell").click()

    def alternative_texts(self) -> list[str | None]:
        """Those of all images that the notebook shows now, in order."""
        return [image.get_attribute("alt") for image in self.page.locator(".jp-OutputArea img").all()]

    def write(self, text: str, source: str) -> None:
        """Put the cursor into the cell that has `text` and replace all that stands there."""
        index = self.index_of(text)
        self.cell(text).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)
        self.cells[index] = source


def shorten(lab: Lab, name: str, changes: dict[str, str]) -> None:
    """Change constants in a notebook of the copy; each must stand there once."""
    file = lab.folder / f"{name}.ipynb"
    text = file.read_text("utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} stands in {name} {text.count(old)} times"
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


def _command(port: int) -> list[str]:
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "allow_root": True}
    server |= {"open_browser": False, "terminals_enabled": False}
    options = [f"--ServerApp.{name}={value}" for name, value in server.items()]
    return [sys.executable, "-m", "jupyterlab", *options, "--LabApp.extension_manager=readonly"]


def _environment(root: Path, token: str) -> dict[str, str]:
    """The user's own settings, extensions and workspaces stay out, and are not touched."""
    jupyter = {f"JUPYTER_{name.upper()}_DIR": str(root / name) for name in ("config", "data", "runtime")}
    lab = {f"JUPYTERLAB_{name.upper()}_DIR": str(root / name) for name in ("settings", "workspaces")}
    others = {"JUPYTER_TOKEN": token, "IPYTHONDIR": str(root / "ipython"), "MPLBACKEND": "agg"}
    return os.environ | jupyter | lab | others


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(lab: Lab, process: subprocess.Popen, log_file: Path) -> None:
    until = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{lab.address}/api?token={lab.token}", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log_file.read_text('utf-8', 'replace')[-3000:]}")


def _end(process: subprocess.Popen) -> None:
    """End the server and its group; kernels, in sessions of their own, are ended by it, or end when it is gone."""
    for sign, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
