import sys

from jobs.cli import run
from jobs.quickstart import main

sys.exit(run(main, sys.argv[1:], "quickstart"))
