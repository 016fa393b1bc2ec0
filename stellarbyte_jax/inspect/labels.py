"""Words of a report and its charts, in English and in Chinese."""

from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_LABELS: dict[str, tuple[str, str]] = {
    # sections
    "report": ("Model report", "模型报告"),
    "structure": ("Structure", "模型结构"),
    "parameters": ("Parameters", "参数量"),
    "memory": ("Memory", "显存与内存"),
    "training_memory": ("Memory of training", "训练显存"),
    "optimizers": ("State of the optimizers", "优化器状态"),
    "weight_memory": ("Memory of the weights", "权重内存"),
    "cache_memory": ("Memory of the key/value cache", "KV 缓存"),
    "flops": ("Floating-point operations a token", "每个 token 的浮点运算"),
    "speed": ("Measured speed", "实测速度"),
    "statistics": ("Statistics of the weights", "权重统计"),
    "layer_statistics": ("Standard deviation by layer", "各层标准差"),
    "comparison": ("Beside a reference", "与参考模型比较"),
    # parts
    "embedding": ("embedding", "词嵌入"),
    "attention": ("attention", "注意力"),
    "mlp": ("MLP", "前馈网络"),
    "router": ("router", "路由器"),
    "experts": ("experts", "专家"),
    "shared_experts": ("shared experts", "共享专家"),
    "norms": ("norms", "归一化"),
    "head": ("head", "输出层"),
    "other": ("other", "其他"),
    # columns
    "part": ("part", "部分"),
    "setting": ("setting", "设置"),
    "value": ("value", "值"),
    "layer": ("layer", "层"),
    "layers": ("layers", "层"),
    "each_layer": ("a layer", "每层"),
    "in_all": ("in all", "总计"),
    "share": ("share", "占比"),
    "trainable": ("trainable", "可训练"),
    "active": ("active (of a token)", "激活（每个 token）"),
    "mean": ("mean", "均值"),
    "std": ("standard deviation", "标准差"),
    "largest": ("largest magnitude", "最大绝对值"),
    "zeros": ("zeros", "零值"),
    "below": ("below {}", "小于 {}"),
    "dtype": ("dtype", "数据类型"),
    "size": ("size", "大小"),
    "optimizer": ("optimizer", "优化器"),
    "batch_size": ("batch size", "批大小"),
    "prefill": ("prompt, tokens/s", "提示词，tokens/s"),
    "decode": ("output, tokens/s", "输出，tokens/s"),
    "per_token": ("a token", "每个 token"),
    "per_token_later": ("a token, windows full", "每个 token（窗口已满）"),
    "cache_total": ("{} x {} tokens", "{} × {} 个 token"),
    "causal": ("causal attention", "因果注意力"),
    "full": ("attention counted in full", "完整注意力"),
    "forward": ("forward", "前向"),
    "training": ("training step", "训练一步"),
    "quantity": ("quantity", "项目"),
    "this_model": ("this model", "本模型"),
    "ratio": ("ratio", "比值"),
    "reference": ("reference", "参考模型"),
    # memory
    "weights": ("weights", "权重"),
    "gradients": ("gradients", "梯度"),
    "optimizer_state": ("optimizer ({})", "优化器（{}）"),
    "average": ("average of the weights", "权重滑动平均"),
    "activations": ("activations (estimate)", "激活值（估计）"),
    # structure
    "hidden_size": ("hidden size", "隐藏维度"),
    "heads": ("query heads", "查询头数"),
    "kv_heads": ("key/value heads", "KV 头数"),
    "head_size": ("head size", "头维度"),
    "mlp_size": ("MLP size", "前馈维度"),
    "expert_layers": ("layers with experts", "含专家的层数"),
    "experts_of_layer": ("experts of a layer", "每层专家数"),
    "experts_of": ("{} ({} of a token)", "{}（每个 token {} 个）"),
    "experts_of_pool": ("{} ({} of a token), the same in all", "{}（每个 token {} 个），各层共用"),
    "expert_size": ("expert size", "专家维度"),
    "shared_count": ("shared experts", "共享专家数"),
    "vocabulary": ("vocabulary", "词表大小"),
    "padded": ("{} ({} rows)", "{}（{} 行）"),
    "context": ("context length", "上下文长度"),
    "positions": ("position embedding", "位置编码"),
    "windows": ("layers with a window", "窗口注意力层"),
    "window_of": ("{} of {} tokens", "{} 层，{} 个 token"),
    "memories": ("layers with memory", "带记忆的层"),
    "residual": ("residual style", "残差方式"),
    "sequential": ("sequential", "串行"),
    "parallel": ("parallel", "并行"),
    "tied": ("head tied to the embedding", "输出层与词嵌入共享"),
    "compute_dtype": ("compute dtype", "计算类型"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "none": ("none", "无"),
    # radar
    "parameters_short": ("parameters", "参数量"),
    "active_short": ("active", "激活参数"),
    "flops_short": ("FLOPs", "运算量"),
    "cache_short": ("cache", "缓存"),
    "training_short": ("training memory", "训练显存"),
    "depth": ("depth", "深度"),
    "width": ("width", "宽度"),
    # charts
    "pie_title": ("Parameters by part", "各部分参数占比"),
    "diagram_title": ("Structure", "模型结构"),
    "heatmap_title": ("Standard deviation of weights", "权重标准差"),
    "radar_title": ("Relative to the reference (log scale)", "相对参考模型（对数刻度）"),
    "params_of": ("{} parameters", "{} 参数"),
    "with_active": ("{}, {} active", "{}，激活 {}"),
    "active_of": ("{} active", "{} 激活"),
    "pool": ("experts of all layers", "各层共用的专家"),
    "experts_chosen": ("experts: {} of {}", "专家：{} / {}"),
    "experts_and_shared": ("experts: {} of {}, {} shared", "专家：{} / {}，共享 {}"),
    "router_of": ("router {}", "路由器 {}"),
    "tokens_in": ("token ids", "token 编号"),
    "logits_out": ("logits", "输出分数"),
    "final_norm": ("last norm", "末层归一化"),
    "outside": ("outside", "层外"),
    "full_attention": ("full", "全部"),
    "window_attention": ("window {}", "窗口 {}"),
    "memory_attention": ("memory {}", "记忆 {}"),
    "heads_of": ("{} heads, {} key/value, size {}", "{} 头，KV {} 头，维度 {}"),
    "times": ("{} × {}", "{} × {}"),
    "shared": ("shared with the embedding", "与词嵌入共享"),
    # notes
    "note_parameters": (
        "Rows that pad the vocabulary are counted. A tied head has no weights of its own.",
        "包含词表填充行；共享的输出层没有自己的权重。",
    ),
    "note_active": (
        "Active: of experts no more than one token uses; those that layers share count in each of them.",
        "激活：专家只计每个 token 使用的部分；各层共用的专家在每层都计入。",
    ),
    "note_training": (
        "{} rows of {} tokens at once, remat={}, float32 weights, gradients and optimizer; what the libraries and "
        "the compiler take besides is not counted.",
        "一次 {} 行，每行 {} 个 token，remat={}；权重、梯度、优化器均为 float32；不含库与编译器的额外占用。",
    ),
    "note_cache": (
        "Keys, values and scales of 8-bit storage; windowed layers keep a ring of their window.",
        "键、值与 8 位存储的缩放系数；窗口层只保留窗口大小的环形缓存。",
    ),
    "note_flops": (
        "Training: 6 (parameters - embedding) + 6 L T N H with causal attention, 12 L T N H in full, at T = {}; "
        "the forward pass is a third. A multiply-add is two operations.",
        "训练：6（参数量 - 词嵌入）+ 6 L T N H（因果注意力）或 12 L T N H（完整），T = {}；前向为三分之一。"
        "一次乘加计两次运算。",
    ),
    "note_flops_experts": (
        "The parameters are the active ones.",
        "其中的参数量为激活参数。",
    ),
    "note_speed": (
        "{} tokens of prompt and {} of output a row, greedy, medians of {} runs after compilation, on {}.",
        "每行提示词 {} 个 token、输出 {} 个 token，贪心解码，编译后 {} 次测量取中位数；设备：{}。",
    ),
    "note_fresh": ("The weights are fresh ones, whose speed is the same.", "权重为随机初始化，速度与训练后相同。"),
    "note_statistics": (
        "Shares of weights whose magnitude is below a threshold; rows that pad the vocabulary are left out.",
        "绝对值低于阈值的权重占比；不含词表填充行。",
    ),
    "note_reference": ("The reference is {}.", "参考模型为 {}。"),
}


def label(key: str, language: Language, *values: object) -> str:
    """A word or sentence in a language, with these values in the places of its braces."""
    return _LABELS[key][LANGUAGES.index(language)].format(*values)


def all_characters(language: Language) -> set[str]:
    """Every character that a font must have to show the labels of a language."""
    return set("".join(texts[LANGUAGES.index(language)] for texts in _LABELS.values()))
