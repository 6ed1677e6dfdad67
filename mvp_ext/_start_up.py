"""What comes before anything is imported that takes long."""

import os
import signal
import sys

if os.name != "posix":
    raise ImportError("mvp_ext needs Linux, or another system with POSIX file locks (in Windows: WSL)")

# Ctrl-C while the command's imports run ends it, without a traceback of somebody's module; ``cli.main`` has words.
if os.path.basename(getattr(sys, "argv", [""])[0]) == "mvp-ext":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
