"""Before anything is imported: as on the command line, threads that wait do not spin."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
