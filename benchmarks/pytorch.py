"""The same networks and training steps in PyTorch, in channels_last format.

Run as a file by an interpreter that has PyTorch; it imports nothing of this package. Reads a JSON object: `what`
("training", "inference", "product"), `model`, `stem`, `side`, `batch`, `precision`, `seconds`, `threads`. Prints a
JSON object: `value` (images or GFLOP per second) and `version` (of PyTorch).
"""

import json
import sys
import time
import warnings


def main(job):
    try:
        import torch
    except ImportError:
        return {"missing": "PyTorch is not installed (give an interpreter that has it with --torch-python)"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    value = {"training": training, "inference": inference, "product": product}[job["what"]](torch, job)
    return {"value": value, "version": torch.__version__}


def training(torch, job):
    model, x = build(torch, job)
    labels = torch.arange(job["batch"]) % 4
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)

    def step():
        with autocast(torch, job):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return rate(step, job["batch"], job["seconds"])


def inference(torch, job):
    model, x = build(torch, job)
    model.eval()
    with torch.inference_mode(), autocast(torch, job):
        return rate(lambda: model(x), job["batch"], job["seconds"])


def product(torch, job):
    """GFLOP/s of square matrix products."""
    side = 2048
    kind = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    a, b = torch.randn(side, side).to(kind), torch.randn(side, side).to(kind)
    return rate(lambda: torch.matmul(a, b), 2 * side**3 / 1e9, job["seconds"])


def autocast(torch, job):
    return torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16")


def rate(call, images, seconds):
    call()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return count * images / (time.perf_counter() - start)


def build(torch, job):
    """The network with 4 outputs, and a batch of noise."""
    model = resnet(torch.nn, job["model"], job["stem"]).to(memory_format=torch.channels_last)
    x = torch.randn(job["batch"], 3, job["side"], job["side"]).to(memory_format=torch.channels_last)
    return model, x


def resnet(nn, name, stem):
    """ResNet-18 or -50 (He et al. 2015), the same as in `paddle_medcls.models.architectures.resnet`."""

    def conv_bn(wide_in, wide_out, kernel, stride=1, act=True):
        conv = nn.Conv2d(wide_in, wide_out, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(wide_out), *([nn.ReLU(inplace=True)] if act else []))

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, wide_in, width, wide_out, stride):
            super().__init__()
            if name == "resnet50":
                layers = [conv_bn(wide_in, width, 1), conv_bn(width, width, 3, stride)]
                layers.append(conv_bn(width, wide_out, 1, act=False))
            else:
                layers = [conv_bn(wide_in, width, 3, stride), conv_bn(width, wide_out, 3, act=False)]
            self.branch = nn.Sequential(*layers)
            same = stride == 1 and wide_in == wide_out
            self.shortcut = nn.Identity() if same else conv_bn(wide_in, wide_out, 1, stride, act=False)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.branch(x) + self.shortcut(x))

    depths, times = ((3, 4, 6, 3), 4) if name == "resnet50" else ((2, 2, 2, 2), 1)
    layers = [conv_bn(3, 64, 3)] if stem == "small" else [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    wide = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for order in range(depth):
            layers.append(Block(wide, width, width * times, 2 if order == 0 and stage else 1))
            wide = width * times
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 4))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
