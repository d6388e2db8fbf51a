"""`make report-check`: the logbook page of a real run in a real browser; screenshots for docs/images.

Trains a small model with `trireme run`, kills a rank on the way, adds a note, makes the page, and lets Chromium show it
in a wide window, on a phone, in the dark and on paper. Fails if anything is fetched, if anything but a scrolling table
is wider than the screen, if a figure has no room, or if a label is cut off.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT / "tests" / "trainer")]
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGE = "chromium-headless-shell"
TRIREME = [sys.executable, "-m", "trireme_cli.main"]
STEPS, EVERY, KILL_AT = 120, 25, 70
SIZES = {"desktop": (1100, 1500), "phone": (390, 1500)}
HARNESS = """<!doctype html><title>waiting</title>
<iframe src="report.html" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentWindow, root = page.document.documentElement;
  const inside = e => e.closest(".wide, pre, svg") !== null;
  const beyond = e => !inside(e) && e.getBoundingClientRect().right > {width} + 1;
  const wide = [...page.document.querySelectorAll("body *")].filter(beyond);
  const plots = [...page.document.querySelectorAll(".plot")].map(e => e.getBoundingClientRect());
  const left = [...page.document.querySelectorAll(".plot span")].filter(e => e.getBoundingClientRect().left < 0);
  document.body.textContent = "RESULT" + JSON.stringify({{
    fetched: page.performance.getEntriesByType("resource").map(e => e.name), width: root.scrollWidth,
    wide: wide.map(e => e.tagName + "." + e.className).slice(0, 5), plots: plots.map(r => [r.width, r.height]),
    cut: left.map(e => e.textContent), sections: page.document.querySelectorAll("section").length,
  }}) + "END";
}};
</script>"""


def browser() -> str:
    """Chromium, installed from Debian where it is missing and that is possible."""
    for attempt in (0, 1):
        found = next((path for name in NAMES if (path := shutil.which(name))), None)
        if found:
            return found
        if attempt == 0 and os.geteuid() == 0 and shutil.which("apt-get"):
            print(f"installing {PACKAGE}", flush=True)
            subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", PACKAGE], check=False)
    raise SystemExit(f"no Chromium here; install one of {', '.join(NAMES)}, e.g. apt-get install {PACKAGE}")


def real_run(folder: Path) -> Path:
    """A directory of `trireme run` with two attempts and a note."""
    import yaml
    from gang import make_corpus, make_recipe

    make_corpus(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(Path("corpus"), steps=STEPS)))
    directory = folder / "tiny-opt"
    command = [
        *TRIREME, "run", str(recipe), "--nproc", "2", "--every", str(EVERY), "--data-root", str(folder), "-q", "--json",
        "--dir", str(directory),
    ]  # fmt: skip
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    log = directory / "checkpoints" / "metrics.jsonl"
    while not log.exists() or f'"step": {KILL_AT},' not in log.read_text():
        assert run.poll() is None, "the run ended before a rank could be killed"
        time.sleep(0.1)
    os.kill(rank_pid(run.pid), signal.SIGKILL)
    note = "rank 1 killed by hand, to see what the page makes of it"
    subprocess.run([*TRIREME, "note", "--local", str(directory), note, "--by", "report-check"], check=True)
    assert run.wait() == 0, f"trireme run ended with {run.returncode}"
    return directory


def rank_pid(above: int) -> int:
    from trireme_agent.processes import descendants

    for pid in descendants(above):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"RANK=1" in environment:
            return pid
    raise SystemExit("rank 1 was not found")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def shoot(chromium: str, url: str, size: tuple[int, int], *more: str) -> str:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
        f"--window-size={size[0]},{size[1]}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *more, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def check(chromium: str, server: str, folder: Path, name: str, size: tuple[int, int], *more: str) -> dict[str, Any]:
    (folder / f"{name}.html").write_text(HARNESS.format(width=size[0], height=size[1]))
    text = shoot(chromium, f"{server}/{name}.html", (size[0] + 40, size[1] + 40), "--dump-dom", *more)
    found = re.search(r"RESULT(\{.*\})END", text)
    assert found, f"{name}: the page did not load: {text[:500]}"
    told: dict[str, Any] = json.loads(found.group(1).replace("&amp;", "&"))
    trouble = [f"fetches {told['fetched']}"] if told["fetched"] else []
    trouble += [f"{told['width']} px wide: {told['wide']}"] if told["wide"] or told["width"] > size[0] else []
    trouble += ["a figure without room"] if any(w < 200 or h < 100 for w, h in told["plots"]) else []
    trouble += [f"labels cut off: {told['cut']}"] if told["cut"] else []
    trouble += [f"{len(told['plots'])} figures, {told['sections']} sections"] if len(told["plots"]) < 3 else []
    print(f"{name:<10} {'; '.join(trouble) or 'good'}", flush=True)
    return {"name": name, "trouble": trouble}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="check this page instead of training for one")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where screenshots go")
    parser.add_argument("--pdf", type=Path, help="keep the printed page here")
    options = parser.parse_args()
    chromium = browser()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        page = folder / "report.html"
        if options.page is not None:
            shutil.copy(options.page, page)
        else:
            directory = real_run(folder)
            subprocess.run(
                [*TRIREME, "report", "--local", str(directory), "--zone", "SE", "-o", str(page)], check=True
            )
        handler = functools.partial(Quiet, directory=scratch)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            where = f"http://127.0.0.1:{server.server_address[1]}"
            dark = "--blink-settings=preferredColorScheme=0"
            results = [check(chromium, where, folder, name, size) for name, size in SIZES.items()]
            results.append(check(chromium, where, folder, "dark", SIZES["phone"], dark))
            options.images.mkdir(parents=True, exist_ok=True)
            for name, size in SIZES.items():
                target = options.images / f"report-{name}.png"
                shoot(chromium, f"{where}/report.html", size, f"--screenshot={target}")
            paper = options.pdf or folder / "report.pdf"
            to_paper = (f"--print-to-pdf={paper}", "--no-pdf-header-footer")
            shoot(chromium, f"{where}/report.html", SIZES["desktop"], *to_paper)
            pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
            print(f"{'paper':<10} {pages} pages", flush=True)
            server.shutdown()
    bad = [result["name"] for result in results if result["trouble"]] + ([] if 2 <= pages <= 8 else ["paper"])
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
