# paddle_medcls with the web page. On a CPU:
#
#   docker build -t medcls .
#   docker run --rm -v "$PWD:/data" medcls train --dataset palm --sample --output runs/first
#   docker run --rm -v "$PWD:/data" -p 127.0.0.1:8501:8501 medcls app --address 0.0.0.0
#
# On a GPU, with the package and the index of docs/gpu.md; the wheel brings CUDA:
#
#   docker build -t medcls-gpu --build-arg PADDLE="paddlepaddle-gpu==3.3.1 -i INDEX" .
#   docker run --rm --gpus all -v "$PWD:/data" medcls-gpu train --dataset palm
#
# The RUN lines are those of `make package`, which .ci/run runs; a test compares them.
ARG PYTHON=3.12
FROM python:${PYTHON}
ARG PADDLE=paddlepaddle
WORKDIR /paddle_medcls
COPY . .
RUN pip install --quiet --disable-pip-version-check $PADDLE
RUN pip install --quiet --disable-pip-version-check "setuptools<81" opencv-python-headless ".[app,dicom,engines,xlsx]"
RUN mkdir package-trial
RUN cd package-trial && medcls train --dataset palm --sample --recipe palm_tutorial --model resnet18 --epochs 1 --set size_px=32 --output run
RUN cd package-trial && medcls predict run/sample/PALM-Validation400/V0001.jpg --weights run --csv predictions.csv
RUN rm -r package-trial
WORKDIR /data
ENTRYPOINT ["medcls"]
CMD ["--help"]
