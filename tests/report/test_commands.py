"""Status, report and best adapter of a sweep with every state.

`pytest tests/report/test_commands.py`
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from job.ledger.ledger import Ledger
from job.report.attempts_table import attempts_json
from job.report.comparison import read_compared
from job.report.overview import Overview, State, read_overview
from job.report.page import html_page, markdown
from job.report.table import stuck_slots, to_json, to_prometheus
from job.store.local import LocalStore
from tests import every_state, forked
from tests.browser import chromium, requests

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def ledger(folder: Path) -> Ledger:
    return every_state.make_sweep(folder)[0]


@pytest.fixture(scope="module")
def overview(ledger: Ledger) -> Overview:
    return read_compared(ledger, every_state.NUM_SLOTS)


@pytest.fixture
def copy(folder: Path, ledger: Ledger, tmp_path: Path) -> Path:
    """The same sweep, to be damaged."""
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path


@pytest.fixture(scope="module")
def page(overview: Overview, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(html_page(overview, usd_per_hour=0.35))
    return path


def _job(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "job", *words],
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JOB_OUTPUT_URI": f"{folder}/out",
            "JOB_SWEEP_NAME": "s", "JOB_NUM_TRIALS": "20", "JOB_WORK_DIR": f"{folder}/work",
        } | environ,
        timeout=120, cwd=ROOT,
    )  # fmt: skip


def test_every_state_is_seen(overview: Overview) -> None:
    states = {view.slot: view.state for view in overview.slots}
    assert {slot: states[slot] for slot in every_state.STATUSES} == every_state.STATUSES
    assert states[every_state.WAITING] == "waiting"
    assert states[every_state.RUNNING] == "running"
    assert states[every_state.EXCLUDED] == "excluded"
    running, redone = overview.slots[every_state.RUNNING], overview.slots[every_state.REDONE]
    assert (running.step, running.eval_loss, running.attempts) == (800, 1.09, 2)
    assert running.lease_age_seconds is not None
    assert running.lease_age_seconds < 60
    assert redone.gpu_seconds == pytest.approx(2 * redone.wasted_gpu_seconds, rel=0.01)
    assert states[every_state.GIVEN_UP] == "given up"
    assert states[every_state.DAMAGED] == "damaged"
    assert [states[slot] for slot in every_state.EMPTY] == ["empty", "empty"]
    assert set(states.values()) == set(get_args(State))
    for slot in every_state.PREEMPTED_ONCE:
        assert overview.slots[slot].attempts == 2
        assert overview.slots[slot].state == "completed"


def test_slots_beyond_num_trials_are_seen(ledger: Ledger) -> None:
    assert len(read_overview(ledger, 2).slots) == every_state.NUM_SLOTS - len(every_state.EMPTY)


def test_a_result_of_another_shape_is_damage_and_hides_nothing(copy: Path) -> None:
    result = copy / "out/sweeps/s/slots/0001/result.json"
    result.write_text('{"status": "completed", "curve": 5}')
    slots = read_overview(Ledger(LocalStore(copy / "out"), "s"), 4).slots
    assert [view.state for view in slots[:3]] == ["completed", "damaged", "completed"]


def test_a_silent_lease_names_the_command_that_is_safe(overview: Overview) -> None:
    silent = replace(overview.slots[4], state="running", node="job-4", lease_age_seconds=900.0)
    stuck = stuck_slots(replace(overview, slots=(silent,)), lease_seconds=120)
    assert len(stuck) == 1
    assert "job-completion-index=4" in stuck[0]
    assert "kubectl taint nodes" in stuck[0]
    assert "delete" not in stuck[0], "the Job's finalizer keeps a deleted pod"
    assert stuck_slots(replace(overview, slots=(silent,)), lease_seconds=600) == []


def test_json_holds_every_slot(overview: Overview) -> None:
    content = json.loads(to_json(overview))
    assert len(content["slots"]) == every_state.NUM_SLOTS
    assert content["best_slot"] == overview.best.slot if overview.best else None
    judged = {view.slot for view in overview.slots if view.judged} - {content["best_slot"]}
    assert {entry["slot"] for entry in content["comparison"]["behind"]} == judged


def test_json_holds_every_attempt_where_it_is_asked_for(copy: Path) -> None:
    slot = every_state.PREEMPTED_ONCE[0]
    plain, asked = (
        json.loads(_job(copy, "status", "--json", *words).stdout) for words in ((), ("--attempts",))
    )
    assert "attempts" not in plain
    attempts = asked.pop("attempts")
    left_out = {"lease_age_seconds"}  # grows meanwhile
    assert [{**view, **dict.fromkeys(left_out)} for view in asked["slots"]] == [
        {**view, **dict.fromkeys(left_out)} for view in plain["slots"]
    ]
    own = [attempt for attempt in attempts if attempt["slot"] == slot]
    assert [attempt["epoch"] for attempt in own] == [1, 2]
    assert [attempt["exit_code"] for attempt in own] == [75, 0]
    redone = {one["generation"] for one in attempts if one["slot"] == every_state.REDONE}
    assert redone == {0, 1}, "those before a redo were paid for, too"
    assert [
        error.message for error in _schema("status").iter_errors({**asked, "attempts": own})
    ] == []


def test_an_attempt_that_cannot_be_read_is_told_and_hides_no_other(copy: Path) -> None:
    slot = every_state.PREEMPTED_ONCE[0]
    versions = [*(copy / f"out/sweeps/s/slots/{slot:04d}/attempts").glob("1-*.json*")]
    for path in versions:
        path.write_text("{")
    found = attempts_json(Ledger(LocalStore(copy / "out"), "s"), every_state.NUM_SLOTS)
    (damaged,) = [attempt for attempt in found if attempt["slot"] == slot]
    assert str(min(versions)) in damaged["damaged"]
    assert {attempt["slot"] for attempt in found} >= {slot - 1, slot + 1}
    schema = _schema("attempt")
    assert all(map(schema.is_valid, found))
    assert not schema.is_valid({"slot": slot, "generation": 0})


def _schema(name: str) -> Draft202012Validator:
    schema = json.loads((ROOT / "docs/verbs.schema.json").read_text())["$defs"]
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema})


@pytest.mark.parametrize("form", ["--prometheus", "--watch"])
def test_attempts_are_refused_where_they_would_not_be_shown(copy: Path, form: str) -> None:
    done = _job(copy, "status", "--attempts", form)
    assert (done.returncode, done.stdout) == (64, "")
    said = f"--attempts belongs to the table or to --json, and {form} does not show them; leave"
    assert said in done.stderr.splitlines()[-1]


def test_prometheus_samples_stand_in_families(overview: Overview) -> None:
    lines = to_prometheus(overview).splitlines()
    names = [line.split("{")[0] for line in lines if not line.startswith("#")]
    assert names == sorted(names, key=names.index), "a family's samples stand together"
    assert 'qlora_sweep_trials{sweep="s",state="damaged"} 1' in lines
    for name in set(names):
        assert sum(line.startswith(f"# TYPE {name} ") for line in lines) == 1


def test_markdown_names_the_best_and_every_slot(overview: Overview) -> None:
    text = markdown(overview, usd_per_hour=0.35)
    assert overview.best is not None
    assert f"Best: slot {overview.best.slot}" in text
    assert text.count("\n| ") == every_state.NUM_SLOTS + 2
    assert f"Take slot {overview.best.slot}" in text
    assert text.count(" ± ") >= sum(view.judged for view in overview.slots) - 1


def test_what_a_bucket_says_is_escaped(overview: Overview) -> None:
    evil = replace(overview, sweep="<script>alert(1)</script>")
    assert "<script>alert" not in html_page(evil, usd_per_hour=None)


def test_an_empty_sweep_has_a_page_too(tmp_path: Path) -> None:
    nothing = read_overview(Ledger(LocalStore(tmp_path), "s"), 3)
    assert "no trial yet" in html_page(nothing, usd_per_hour=None)
    assert "0 of 3" in markdown(nothing, usd_per_hour=None)


@pytest.fixture(scope="module", params=[(1280, "0"), (1280, "1"), (400, "1")], ids=str)
def browser(request: pytest.FixtureRequest, page: Path) -> Iterator[Any]:
    """The page, wide and narrow, dark (0) and light (1)."""
    width, scheme = request.param
    preference = f"--blink-settings=preferredColorScheme={scheme}"
    with chromium(width, 1600, preference) as driver:
        driver.get(page.as_uri())
        yield driver


def test_the_page_runs_without_an_error_and_fetches_nothing(browser: Any, page: Path) -> None:
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []


def test_the_page_has_all_charts_and_no_sideways_scroll(browser: Any) -> None:
    assert len(browser.find_elements("css selector", "figure svg")) == 8
    inner, outer = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert inner <= outer


def test_a_click_sorts_the_table_and_empty_cells_go_last(browser: Any) -> None:
    def column(number: int) -> list[str]:
        cells = browser.find_elements("css selector", f"#trials td:nth-child({number})")
        return [cell.get_attribute("data-key") for cell in cells]

    head = browser.find_element("css selector", "#trials th:nth-child(3) button")
    browser.execute_script("arguments[0].click()", head)
    rising = [float(key) for key in column(3) if key]
    assert rising == sorted(rising)
    assert column(3)[: len(rising)] == [key for key in column(3) if key]
    browser.execute_script("arguments[0].click()", head)
    assert [float(key) for key in column(3) if key] == sorted(rising, reverse=True)


def _lit(browser: Any) -> tuple[set[str], str]:
    """The slots that are lit up, and the words that name the trial."""
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.lit')].map(mark => mark.dataset.slot)"
    )
    return set(marks), browser.execute_script("return document.querySelector('#lit').textContent")


def _charts_lit(browser: Any) -> int:
    return int(
        browser.execute_script(
            "return [...document.querySelectorAll('figure')].filter(f => f.querySelector('.lit'))"
            ".length"
        )
    )


def _point_at(browser: Any, css: str) -> None:
    from selenium.webdriver import ActionChains

    mark = browser.find_element("css selector", css)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(browser).move_to_element(mark).perform()


def _press(browser: Any, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


def test_pointing_at_a_trial_names_it_and_lights_it_up_everywhere(
    browser: Any, overview: Overview
) -> None:
    assert overview.best is not None
    best = str(overview.best.slot)
    other = next(str(v.slot) for v in overview.slots if v.judged and str(v.slot) != best)
    _press(browser, "\ue00c")  # Escape
    for slot in (best, other):
        _point_at(browser, f'circle[data-slot="{slot}"]')
        marked, words = _lit(browser)
        assert marked == {slot}
        view = overview.slots[int(slot)]
        told = f"slot {slot} ({view.state}), eval/loss {view.eval_loss:.4f}: gradient_"
        assert words.startswith(told)
        assert _charts_lit(browser) >= 5
        assert browser.find_elements("css selector", f'tr.lit[data-slot="{slot}"]')
    _point_at(browser, "h1")
    assert _lit(browser) == (set(), "")


def test_a_click_keeps_it_lit_and_escape_lets_it_go(browser: Any, overview: Overview) -> None:
    _press(browser, "\ue00c")
    row = browser.find_element("css selector", 'tr[data-slot="1"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    row.click()
    _point_at(browser, "h1")
    assert _lit(browser)[0] == {"1"}
    row.click()
    _point_at(browser, "h1")
    assert _lit(browser)[0] == set(), "a second click lets it go as well"
    row.click()
    _press(browser, "\ue00c")
    assert _lit(browser) == (set(), "")


def test_the_keyboard_goes_from_trial_to_trial(browser: Any) -> None:
    browser.execute_script("document.querySelector('tbody tr[data-slot]').focus()")
    first = _lit(browser)[0]
    assert len(first) == 1
    _press(browser, "\ue015")  # arrow down
    second = _lit(browser)[0]
    assert len(second) == 1
    assert second != first
    _press(browser, "\ue013")  # arrow up
    assert _lit(browser)[0] == first
    _press(browser, "\ue007")  # Enter
    browser.execute_script("document.activeElement.blur()")
    assert _lit(browser)[0] == first, "kept"
    _press(browser, "\ue00c")
    assert _lit(browser)[0] == set()


def test_a_tap_lights_a_trial_up(browser: Any) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    _press(browser, "\ue00c")
    row = browser.find_element("css selector", 'tr[data-slot="2"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    finger = ActionBuilder(browser, mouse=PointerInput("touch", "finger"))
    finger.pointer_action.move_to(row).pointer_down().pointer_up()
    finger.perform()
    assert _lit(browser)[0] == {"2"}
    _press(browser, "\ue00c")
    assert browser.get_log("browser") == []


def test_the_verbs_print_to_a_pipe_and_to_files(folder: Path, ledger: Ledger) -> None:
    status = _job(folder, "status")
    assert status.returncode == 0, status.stderr
    assert "best: slot" in status.stdout
    assert "\x1b" not in status.stdout, "no colours in a pipe"
    report = _job(folder, "report", "--output", str(folder / "report"))
    assert report.returncode == 0, report.stderr
    assert (folder / "report/report.html").stat().st_size > 10_000
    to_bucket = _job(folder, "report")
    assert to_bucket.stdout.splitlines()[0].endswith("out/sweeps/s/report.html")
    samples = folder / "sweep.prom"
    assert _job(folder, "status", "--prometheus", str(samples)).returncode == 0
    assert samples.read_text().startswith("# HELP qlora_sweep_trials")


def test_the_best_adapter_is_fetched_and_checked(folder: Path, ledger: Ledger) -> None:
    done = _job(folder, "best", "--download", str(folder / "adapter"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    again = _job(folder, "best", "--download", str(folder / "adapter"))
    assert again.returncode == 64
    assert f"best --download: {folder}/adapter is not empty" in again.stderr
    assert "give a new or an empty folder" in again.stderr


def test_another_trials_adapter_is_fetched_by_its_slot(
    folder: Path, ledger: Ledger, overview: Overview
) -> None:
    assert overview.best is not None
    other = next(v for v in overview.slots if v.judged and v.slot != overview.best.slot)
    done = _job(folder, "best", "--slot", str(other.slot), "--download", str(folder / "other"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slot"] == other.slot
    text = (folder / "other/adapter_model.safetensors").read_text()
    assert text == str(other.eval_loss)
    assert _job(folder, "best", "--slot", "20").returncode == 64
    infeasible = _job(folder, "best", "--slot", "9")
    assert infeasible.returncode == 69
    assert "slot 9 is infeasible and has no adapter" in infeasible.stderr


def test_a_flipped_byte_in_the_best_adapter_is_found(copy: Path, overview: Overview) -> None:
    assert overview.best is not None
    (copy / "out" / str(overview.best.adapter_key) / "adapter_config.json").write_text("[]")
    done = _job(copy, "best", "--download", str(copy / "adapter"))
    assert done.returncode == 69
    assert f"slot {overview.best.slot}'s adapter is damaged: " in done.stderr
    assert "corrupt" in done.stderr
    assert not (copy / "adapter").exists()


@pytest.mark.parametrize("verb", ["best", "report"])
def test_a_sweep_that_is_not_there_is_no_empty_one(tmp_path: Path, verb: str) -> None:
    done = _job(tmp_path, verb)
    assert done.returncode == 64
    assert "there is no sweep s in" in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_outputs_that_cannot_be_written_are_named_before_anything_is_fetched(copy: Path) -> None:
    (copy / "file").write_text("")
    for words in (["best", "--download"], ["best", "--merge"], ["report", "--output"],
                  ["status", "--prometheus"]):  # fmt: skip
        done = _job(copy, *words, f"{copy}/file/below")
        assert done.returncode == 64, done.stderr
        assert f"{' '.join(words)}: {copy}/file/below" in done.stderr
        assert "Traceback" not in done.stderr
