# nemo_dapo in NVIDIA's NeMo container: its torch, Transformer Engine, apex, Megatron-core and Megatron-Bridge stay as they are.
#   docker build -t nemo_dapo . && docker run --gpus all nemo_dapo torchrun examples/train_dapo.py --cfg job
FROM nvcr.io/nvidia/nemo:26.06

# vLLM in an environment of its own (rollout.python): trainer and servers need not agree on a torch version.
RUN python3 -m venv /opt/vllm && /opt/vllm/bin/pip install --no-cache-dir vllm==0.32.0

WORKDIR /opt/nemo_dapo
# Without dependencies: a resolver would exchange the container's torch for another one.
COPY requirements/ngc.txt requirements/ngc.txt
RUN pip install --no-cache-dir --no-deps --requirement requirements/ngc.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . && /opt/vllm/bin/pip install --no-cache-dir --no-deps .

# A missing piece fails the build, not the job.
RUN python -c "from nemo.core.config import hydra_runner; import mpmath, datasets, httpx, tensorboard" \
 && python -c "import torch, megatron.core, megatron.bridge, transformer_engine; import nemo_dapo.trainer, nemo_dapo.controller" \
 && /opt/vllm/bin/python -c "import vllm, nemo_dapo.rollout.vllm_plugin"
ENV VLLM_PYTHON=/opt/vllm/bin/python
