"""Published entry point of stage 2: runs `Inference/image_summary.py`.

python Inference/microlens/image_summary.py [--option value ...]
"""

import runpy
from pathlib import Path

if __name__ == "__main__":  # without --config, every stage takes configs/microlens.yaml
    stage = Path(__file__).parents[1] / "image_summary.py"
    runpy.run_path(str(stage), run_name="__main__")
