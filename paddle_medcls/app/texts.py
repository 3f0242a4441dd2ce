"""The words of the page: key -> (English, Chinese)."""

from __future__ import annotations

from paddle_medcls.report import DRAWN_NOTICE, NOTICE

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "title": ("Medical image classification", "医学图像分类"),
    "notice": (NOTICE, "仅供研究和教学；不得用于诊断。"),
    "any_picture": (
        "The network answers for every picture, also for one that is nothing like those it was trained on.",
        "网络对任何图片都会给出答案，即使它与训练图像毫不相像。",
    ),
    "drawn_model": (
        f"This model was trained on drawn images. {DRAWN_NOTICE}",
        "这个模型是用程序画出的样例图训练的，其数字不说明任何病人的情况。",
    ),
    # the model
    "model": ("Model", "模型"),
    "typed": ("A path on this machine …", "输入本机路径 …"),
    "uploaded": ("Upload a weight file …", "上传权重文件 …"),
    "path": ("Path of the weight file", "权重文件的路径"),
    "weights_upload": (
        "Weight file (.pdparams, .safetensors) and its sidecar (.json)",
        "权重文件（.pdparams、.safetensors）及其说明文件（.json）",
    ),
    "weights_note": (
        "Kept in a temporary folder until the page ends. No code in it is run.",
        "保存在临时文件夹，页面结束时删除。不会运行其中的任何代码。",
    ),
    "one_weight_file": ("Give one weight file and at most one .json.", "请给出一个权重文件和至多一个 .json。"),
    "no_such_file": ("There is no file {path}.", "没有文件 {path}。"),
    "bad_model": ("The model cannot be used: {fault}", "这个模型不能用：{fault}"),
    "loading": ("Loading the model …", "正在载入模型 …"),
    "no_model": (
        "No model yet. Choose, type or upload one under “Model” at the left; `tools/train.py` trains one.",
        "还没有模型。请在左侧“模型”中选择、输入路径或上传；也可用 `tools/train.py` 训练一个。",
    ),
    # images
    "predict": ("Prediction", "预测"),
    "images": ("Images (PNG, JPEG, TIFF, BMP, WebP, DICOM)", "图像（PNG、JPEG、TIFF、BMP、WebP、DICOM）"),
    "images_help": (
        "Several at once are fine. They stay in the memory of the machine that runs this page.",
        "可一次选多张。图像只留在运行本页面的机器的内存里。",
    ),
    "samples": ("No image at hand? Take a drawn one:", "手头没有图像？用程序画的样例："),
    "drawn_name": ("drawn: {name}", "画出的样例：{name}"),
    "drawn_image": (
        "This picture was drawn by the program. It shows no patient.",
        "这张图是程序画出来的，不是病人的图像。",
    ),
    "first": ("Upload an image, or take a drawn one.", "请上传图像，或选一张画出的样例。"),
    "predicting": ("Predicting {n} of {total} …", "正在预测第 {n} 张，共 {total} 张 …"),
    "more_faults": ("… and {n} more files that could not be read.", "…… 另有 {n} 个文件读不了。"),
    "show": ("Image shown below", "下面显示的图像"),
    # the table
    "table": ("All images", "全部图像"),
    "image": ("Image", "图像"),
    "decision": ("Decision", "判定"),
    "probability": ("Probability", "概率"),
    "download": ("Download as CSV", "下载 CSV"),
    # one image
    "none": ("none of the labels", "无任何标签"),
    "most_probable": ("the most probable of {n} classes", "{n} 个类别中概率最大"),
    "above": ("{name}: {p} is above the threshold of {threshold}", "{name}：{p} 高于阈值 {threshold}"),
    "not_above": ("{name}: {p} is not above the threshold of {threshold}", "{name}：{p} 不高于阈值 {threshold}"),
    "labels_above": (
        "{k} of {n} labels are above the threshold of {threshold}",
        "{n} 个标签中 {k} 个高于阈值 {threshold}",
    ),
    "more_classes": ("… and {n} more classes, each below {p}", "…… 另有 {n} 个类别，均低于 {p}"),
    "heat_class": ("Heat map for the class", "热力图解释的类别"),
    "opacity": ("Opacity of the heat map", "热力图的不透明度"),
    "heat": ("Grad-CAM: what speaks for {name}", "Grad-CAM：支持 {name} 的区域"),
    "heat_least": ("none", "无"),
    "heat_most": ("most", "最多"),
    "heat_note": (
        "Roughly where the network looked, not why, and not to the pixel.",
        "大致是网络看的位置，不说明原因，也不精确到像素。",
    ),
    "no_heat": ("No heat map: {fault}", "没有热力图：{fault}"),
    "empty_heat": ("The map is empty: nothing speaks for this class.", "热力图是空的：没有任何地方支持这个类别。"),
    # the card
    "card": ("About the model", "模型说明"),
    "data": ("Data set", "数据集"),
    "drawn": ("drawn by the project", "由程序画出"),
    "recipe": ("Recipe", "配方"),
    "task": ("Task", "任务"),
    "classes": ("Classes", "类别"),
    "date": ("Date of the file", "文件日期"),
    "network": ("Network", "网络"),
    "outputs": ("{n} output(s), {channels} channel(s), {stem} stem", "{n} 个输出，{channels} 个通道，{stem} 输入层"),
    "preprocessing": ("Preprocessing", "预处理"),
    "flips": ("Averaged over flips", "翻转后取平均"),
    "temperature": ("Temperature", "温度"),
    "threshold": ("Threshold", "阈值"),
    "versions": ("Versions", "版本"),
    "assumed": ("Assumed", "假定"),
    "figures": ("Figures on {split}, {n} images", "{split} 上的指标，{n} 张图像"),
    "figures_note": (
        "Validation images also chose the epoch, so their figures are optimistic.",
        "验证图像同时用来挑选轮次，因此这些数字偏乐观。",
    ),
    "no_figures": ("The file says nothing about how good the model is.", "文件没有说明模型的好坏。"),
    "figure": ("figure", "指标"),
    "value": ("value", "数值"),
    "interval": ("95% interval", "95% 区间"),
    "loss": ("loss", "损失"),
    "accuracy": ("accuracy", "准确率"),
    "auc": ("AUC", "AUC"),
    "sensitivity": ("sensitivity", "灵敏度"),
    "specificity": ("specificity", "特异度"),
    "quadratic_kappa": ("quadratic kappa", "二次加权 kappa"),
    "mean_absolute_error": ("mean absolute error", "平均绝对误差"),
    "calibration_error": ("calibration error", "校准误差"),
    "class": ("class", "类别"),
    "precision": ("precision", "精确率"),
    "recall": ("recall", "召回率"),
    "f1": ("F1", "F1"),
    "support": ("images", "图像数"),
}


def words(language: str) -> dict[str, str]:
    """All texts of one language."""
    column = list(LANGUAGES).index(language)
    return {key: both[column] for key, both in TEXTS.items()}
