"""Write page.html, the template of `dvc plots show`, with the chart libraries in it.

So the page works offline. DVC writes its charts for Vega-Lite 5. The setting that names the
template is in .dvc/config.local, because DVC shows no plots if the file is missing, as in a clone.

python .dvc/plots/make_page.py
"""

import subprocess
import sys
from pathlib import Path

import vl_convert

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Reward model</title>
<style>
body {{ font-family: sans-serif; margin: 2rem; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(470px, 1fr)); gap: 2rem; }}
</style>
<script>{scripts}</script>
</head>
<body>{{plot_divs}}</body>
</html>
"""

# The library's type stub requires a snippet, but the function has a default for it.
bundle = vl_convert.javascript_bundle(vl_version="5.21")  # type: ignore[call-arg]
scripts = bundle.replace("</script", "<\\/script")
folder = Path(__file__).parent
(folder / "page.html").write_text(PAGE.format(scripts=scripts), encoding="utf-8")
command = [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template"]
subprocess.run([*command, "plots/page.html"], cwd=folder, check=True)
