# The toolkit with its packages and a model; the README's section Docker shows how to build and use it.
FROM python:3.11-slim-bookworm
WORKDIR /convai

# What changes least comes first, so that a change of the code is built in seconds. The cache mounts belong to the
# builder: they save downloads when a layer is made again, and nothing of them is in the image.

# cpu, or cu126, cu130, ...: a build of torch from pytorch.org; everything else comes from PyPI. Asking for exactly that
# build makes a wrong name an error, where pip would fall back on PyPI's.
ARG TORCH=cpu
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --extra-index-url "https://download.pytorch.org/whl/$TORCH" \
        "$(grep '^torch==' requirements.txt)+$TORCH" && \
    pip install -r requirements.txt

# A .tar.gz of a model folder, by default the published fine-tuned model; empty: none. cli.py and files.py are only lent
# to this step, and the other files are not: they change without it. Archives may hold files that only their maker can read.
ARG MODEL_URL=https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz
RUN --mount=type=cache,target=/root/.cache/improvedflend \
    --mount=type=bind,source=cli.py,target=/convai/cli.py \
    --mount=type=bind,source=files.py,target=/convai/files.py \
    mkdir models && \
    if [ -n "$MODEL_URL" ]; then \
        folder=$(python3 -B -c "import sys, cli, files; cli.run_script(lambda: print(files.unpack(files.download( \
            sys.argv[1], 'pass another --build-arg MODEL_URL=..., or an empty one for an image without a model'))))" \
            "$MODEL_URL") && \
        cp -r "$folder/." models/ && chmod -R a+rX models; \
    else \
        printf '%s\n' "This image was built without a model. Mount the folder of one in its place:" "" \
            "    docker run --rm -it -v /path/to/model:/convai/models convai python3 interact.py --model models/" "" \
            "or build with --build-arg MODEL_URL=... (see the section Docker in ../README.md)." > models/README.md; \
    fi

# --chmod: readable for every user, whatever the umask of the one who cloned.
COPY --chmod=755 . ./
# Any --user can write where the scripts do by default: the working folder (the sticky bit keeps the scripts as they
# are), runs/, and the caches in the home. One that the image does not know has no home or name but these.
RUN useradd --home-dir /convai convai && mkdir -m 777 runs .cache && chmod 1777 .
ENV HOME=/convai USER=convai
USER convai

# As the first process of a container, Python would ignore the SIGTERM of `docker stop`; this is Ctrl-C.
STOPSIGNAL SIGINT
CMD ["python3", "interact.py", "--model", "models/"]
