"""The names that `import anyquant as aq` promises, in a fresh process."""

import subprocess
import sys


def test_the_verbs_stay_verbs_after_the_first_was_used() -> None:
    code = "import anyquant as aq; aq.make; assert callable(aq.evaluate), aq.evaluate; from anyquant import evaluate"
    subprocess.run([sys.executable, "-c", code + "; assert callable(evaluate)"], check=True)
