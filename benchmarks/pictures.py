"""Take the README's screenshots of the last run: `dvc plots show` and the page of judgements.

python -m benchmarks.pictures
"""

import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from reward.process import command_line
from tools.browser import Browser

RESULTS = Path("benchmarks/results")
JUDGEMENTS = Path("reports/evaluate/index.html")
# Scripts draw the charts after the page has loaded.
SECONDS = 3


def main() -> None:
    with TemporaryDirectory() as scratch, Browser(Path(scratch) / "profile") as browser:
        plots = Path(scratch) / "plots"
        subprocess.run(["dvc", "plots", "show", "--out", str(plots)], check=True)
        browser.open(plots / "index.html", width=1560)
        time.sleep(SECONDS)
        height = browser.run("document.documentElement.scrollHeight")
        browser.open(plots / "index.html", width=1560, height=height)
        time.sleep(SECONDS)
        browser.picture(RESULTS / "plots.png")
        browser.open(JUDGEMENTS, width=1280, height=640)
        browser.picture(RESULTS / "judgements.png")


if __name__ == "__main__":
    command_line("benchmarks.pictures", __doc__).parse_args()
    main()
