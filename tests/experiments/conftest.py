import multiprocessing
import shutil
import sys
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest

from asam.experiments import compare, runs, workers
from asam.experiments.cli import run
from asam.experiments.database import open_database


@pytest.fixture(scope="module", autouse=True)
def forked():
    """Workers of commands in this process are forked by the server, which has imported torch, instead of spawned."""

    def get_context(_):
        forkserver.ensure_running()  # now: it would keep the signals blocked that are blocked where it starts
        return multiprocessing.get_context("forkserver")

    server = SimpleNamespace(get_context=get_context)
    with pytest.MonkeyPatch.context() as patch:
        for module in (compare, workers):
            patch.setattr(module, "multiprocessing", server)
        yield


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """What a test has left open of a database; Python says so from 3.13 on."""
    storages = []

    def noted(url):
        storages.append(open_database(url))
        return storages[-1]

    monkeypatch.setattr(runs, "open_database", noted)
    yield
    for storage in storages:
        storage.engine.dispose()


@pytest.fixture
def asam(monkeypatch, capsys, tmp_path):
    """The command line in this process: exit code, standard output, standard error without the bar."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["asam", *map(str, arguments)])
        code = run()
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.startswith("asam:") or "Traceback" in line]
        return SimpleNamespace(code=code, out=printed.out, said=said)

    return command


@pytest.fixture
def browser():
    """Opens a page in headless Chromium, in a window of some width; with WebGL in software."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = """--headless --no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader
        --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync
        --disable-dev-shm-usage"""
    for flag in flags.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def open_page(path, width):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        page.get(path.as_uri())
        return page

    yield open_page
    page.quit()
