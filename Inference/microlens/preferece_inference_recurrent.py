"""Published entry point of stage 3 (spelled so by its authors).

Runs `Inference/preference_recurrent.py`.

    python Inference/microlens/preferece_inference_recurrent.py [--option value ...]
"""

import runpy
from pathlib import Path

if __name__ == "__main__":  # without --config, every stage takes configs/microlens.yaml
    stage = Path(__file__).parents[1] / "preference_recurrent.py"
    runpy.run_path(str(stage), run_name="__main__")
