"""Write page.html, the template of `dvc plots show`, with the chart libraries in it.

So the page works offline. DVC writes its charts for Vega-Lite 5.

python .dvc/plots/make_page.py
"""

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
Path(__file__).with_name("page.html").write_text(PAGE.format(scripts=scripts), encoding="utf-8")
