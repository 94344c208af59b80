"""Published entry point of stage 3 (spelled so by its authors): `Inference/preference_recurrent.py` with configs/microlens.yaml.

python Inference/microlens/preferece_inference_recurrent.py [--option value ...]
"""

from data_processing.errors import run
from Inference.preference_recurrent import main

if __name__ == "__main__":
    run(main)  # without --config, every stage takes configs/microlens.yaml
