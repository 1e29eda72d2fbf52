"""The README's example; test_docs has its commands and links."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_loads_no_model_library_and_keeps_its_promise():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # At most twenty lines of code, as the heading says; imports and blanks aside.
    lines = [x for x in code.splitlines() if x.strip() and "import" not in x]
    assert len(lines) <= 20
    heavy = {"flax", "orbax", "transformers", "grain", "matplotlib", "torch"}
    check = f"\nimport sys; assert not {heavy} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code + check],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    share = float(done.stdout.rsplit(":", 1)[1])
    # The documented guarantee of update_projection.
    assert share <= 1e-5
