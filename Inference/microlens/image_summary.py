"""Published entry point of stage 2: `Inference/image_summary.py` with configs/microlens.yaml.

python Inference/microlens/image_summary.py [--option value ...]
"""

from data_processing.errors import run
from Inference.image_summary import main

if __name__ == "__main__":
    run(main)  # without --config, every stage takes configs/microlens.yaml
