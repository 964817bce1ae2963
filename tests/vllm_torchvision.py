"""Let torchvision be imported beside a torch that its C++ part was not built for.

Run once in an environment: where ``import torchvision`` fails there, it writes a hook into
site-packages that declares the two operators torchvision asks for at import. They are never
called: boxes are no part of what is tested.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = """
import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(
                    operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            sys.dycoke_torchvision = self
        return None


sys.meta_path.insert(0, Declare())
"""


def main() -> None:
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        packages = Path(sysconfig.get_paths()["purelib"])
        (packages / "_dycoke_torchvision.py").write_text(HOOK)
        (packages / "dycoke_torchvision.pth").write_text("import _dycoke_torchvision\n")
        subprocess.run([sys.executable, "-c", "import torchvision"], check=True)


if __name__ == "__main__":
    main()
