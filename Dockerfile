# The environment of requirements.txt and the code; built by you: docker build -t mllmrec .
# A run, with the GPUs and your folders:
#   docker run --rm --gpus all -v "$PWD/data:/app/data" -v "$PWD/outputs:/app/outputs" mllmrec \
#       bash scripts/02_image_summary.sh configs/microlens.yaml
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHON=python
WORKDIR /app
# First what the packages depend on, so that a change of the code does not install them again.
COPY requirements.txt pyproject.toml README.md ./
COPY mllmrec ./mllmrec
RUN python -m pip install -r requirements.txt
COPY . .
CMD ["bash", "scripts/02_image_summary.sh", "--help"]
