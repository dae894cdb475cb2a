from pathlib import Path

OPS = sorted(path.parent.name for path in Path(__file__).parent.parent.glob("segops/ops/*/op.py"))
# pytest's arguments for a process on each core: the tests are handed out in order, and who is done takes from others.
SIDE_BY_SIDE = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
