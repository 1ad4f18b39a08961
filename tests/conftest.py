"""The suite neither reads nor writes what the user's own cache and data directories hold."""

import os
import tempfile

_directory = tempfile.TemporaryDirectory(prefix="dflash-mlx-tests-")
for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
    os.environ[name] = os.path.join(_directory.name, name)
