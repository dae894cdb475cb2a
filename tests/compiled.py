"""C++ that tests need: compiled when it is first asked for, and kept under build/."""

import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent


def shared_library(name, sources, folder, **options):
    """Path of the library of these files; `options` are those of torch.utils.cpp_extension.load."""
    import fcntl  # which only Unix has

    from torch.utils.cpp_extension import load

    folder.mkdir(parents=True, exist_ok=True)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where pip puts ninja
    with mock.patch.dict(os.environ, PATH=here), open(folder / "guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # of a build that was killed: PyTorch would wait for it
        load(name, [str(each) for each in sources], build_directory=str(folder), is_python_module=False, **options)
    return folder / f"{name}.so"
