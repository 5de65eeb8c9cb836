# EE-LLM in a container.
#
#   docker build -t ee-llm .                                       plain Python; torch: see below
#   docker build -t ee-llm --build-arg BASE=IMAGE .                on IMAGE; a torch in it (as in NVIDIA's PyTorch
#                                                                  images) is reused and never replaced
#   docker build -t ee-llm --build-arg EE_LLM_TORCH="torch==2.13.0" .    a torch of your choice, as words for pip
#   docker run -it --rm -v "$PWD/runs:/ee-llm/quickstart-run" ee-llm bash examples/quickstart.sh
#
# Which torch: examples/setup_env.sh. A build sees no GPU, so a plain image gets torch's
# CPU build if pip's indices offer one, else the default build with CUDA's libraries (a few GB).
# The steps were tried outside of a container; the image itself has not been built where this was written.
ARG BASE=python:3.12-slim
FROM ${BASE}

# For the index builder, and for torch.compile on a CPU. Without it both have a fallback or an error that says so.
RUN command -v g++ >/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*; }

WORKDIR /ee-llm
ARG EE_LLM_TORCH=
ENV PIP_NO_CACHE_DIR=1

# What decides about the environment first, so that a change in other files doesn't install torch again.
COPY pyproject.toml setup.py requirements.txt LICENSE ./
COPY tests/requirements.txt tests/
COPY examples/setup_env.sh examples/
COPY megatron/__init__.py megatron/
COPY megatron/data/index_builder.cpp megatron/data/
RUN touch README.md && EE_LLM_TORCH="${EE_LLM_TORCH}" bash examples/setup_env.sh

COPY . .
# The stamp holds EE_LLM_TORCH, too: scripts in the container have to see the same.
ENV PATH=/ee-llm/.venv/bin:${PATH} EE_LLM_TORCH="${EE_LLM_TORCH}"
CMD ["bash"]
