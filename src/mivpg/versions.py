"""What runs here: the package, what it stands on, the device and Java."""

import platform
import subprocess

from mivpg import __version__


def installed_versions() -> dict[str, str]:
    """Name to version, for people to read; starts Java for a moment."""
    import torch
    import transformers

    from mivpg.evaluation import find_java

    java = subprocess.run([find_java(), "-version"], capture_output=True, text=True, check=False).stderr.splitlines()
    return {
        "mivpg": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "Java": java[0] if java else "no answer",
    }
