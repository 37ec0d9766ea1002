"""How the parameters of known layouts are cut, by their names. Another layout is another table."""

from collections.abc import Iterable

from shared.checkpoint.cuts import Cut, CutTable

WHOLE, COLUMN_PARALLEL, ROW_PARALLEL = Cut(None), Cut(0), Cut(1)
VOCABULARY = Cut(0, ("vocabulary",))
# Linears [out, in] of attention, cut in whole heads.
QUERIES, KEYS, OUTPUT = Cut(0, ("q",)), Cut(0, ("kv",)), Cut(1, ("q",))
QKV, QKV_ALIKE, GROUPS = Cut(0, ("q", "kv", "kv")), Cut(0, ("q", "q", "q")), Cut(0, ("group",))
GATE_UP = Cut(0, ("even", "even"))

_WEIGHT_OR_BIAS = r"\.(weight|bias)"

# llama, mistral, mixtral, qwen 2 and 3 (and with experts), gemma, phi, phi3, stablelm, olmo2, granite, internlm2, gptj,
# gpt_neo, gpt_neox, opt, bloom, falcon, mpt, bert, roberta, distilbert, CLIP.
HUGGING_FACE = CutTable(
    (
        # embeddings; heads of encoders, which are small
        (r"(position_embeddings?|embed_positions|wpe|token_type_embeddings|patch_embedding)\.weight", WHOLE),
        (r"position_ids|class_embedding|logit_scale", WHOLE),
        (r"(embed_tokens|word_embeddings|wte|embed_in|tok_embeddings|token_embedding)\.weight", VOCABULARY),
        (r"(pooler|predictions\.transform|lm_head)\.dense\.(weight|bias)|vocab_transform\.(weight|bias)", WHOLE),
        (r"(lm_head|embed_out|vocab_projector|decoder)\.(weight|bias)|(^|model\.)output\.weight", VOCABULARY),
        (r"cls\.predictions\.bias|lm_head\.decoder\.(weight|bias)", VOCABULARY),
        (r"(project_in|project_out|text_projection|visual_projection)\.weight", WHOLE),
        (r"(seq_relationship|classifier|score)\.(weight|bias)", WHOLE),
        # norms; of a router's outputs every rank needs all
        (r"\w*([nN]orm|layrnorm)\d?\.(weight|bias)|(ln|norm)_\w+\.(weight|bias)|norms\.\d+\.weight", WHOLE),
        (r"(mlp|block_sparse_moe)\.gate\.weight|shared_expert_gate\.weight", WHOLE),
        (r"gate\.wg\.weight|mlp\.coefficient\.(weight|bias)", WHOLE),
        (r"rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)", WHOLE),
        # attention
        (r"(q_proj|query|q_lin)" + _WEIGHT_OR_BIAS, QUERIES),
        (r"(k_proj|v_proj|key|value|k_lin|v_lin)" + _WEIGHT_OR_BIAS, KEYS),
        (r"(qkv_proj|Wqkv)" + _WEIGHT_OR_BIAS, QKV),
        (r"(query_key_value|wqkv)" + _WEIGHT_OR_BIAS, GROUPS),
        (r"(o_proj|out_proj|out_lin|wo|attention\.output\.dense|(self_attn|(self_)?attention)\.dense)\.weight", OUTPUT),
        (r"(o_proj|out_proj|out_lin|wo|attention\.output\.dense|(self_attn|(self_)?attention)\.dense)\.bias", WHOLE),
        # MLPs and experts
        (r"gate_up_proj" + _WEIGHT_OR_BIAS, GATE_UP),
        (r"(gate_proj|up_proj|fc1|fc_in|c_fc|lin1|w1|w3)" + _WEIGHT_OR_BIAS, COLUMN_PARALLEL),
        (r"(dense_h_to_4h|intermediate\.dense)" + _WEIGHT_OR_BIAS, COLUMN_PARALLEL),
        (r"(down_proj|fc2|fc_out|c_proj|dense_4h_to_h|output\.dense|lin2|w2)\.weight", ROW_PARALLEL),
        (r"(down_proj|fc2|fc_out|c_proj|dense_4h_to_h|output\.dense|lin2|w2)\.bias", WHOLE),
    )
)

# Its linears are [in, out].
GPT2 = CutTable(
    (
        (r"attn\.c_attn\.weight", Cut(1, QKV_ALIKE.parts)),
        (r"attn\.c_attn\.bias", QKV_ALIKE),
        (r"attn\.c_proj\.weight", Cut(0, OUTPUT.parts)),
        (r"mlp\.c_fc\.weight", Cut(1)),
        (r"mlp\.c_proj\.weight", Cut(0)),
        *HUGGING_FACE.rules,
    )
)

# The flat names of megatron.py, whose fused rows are all queries, then all keys, then all values.
MEGATRON = CutTable(
    (
        (r"word_embeddings\.weight|output_layer\.weight|final_linear\.weight|lm_head\.bias", VOCABULARY),
        (r"(position|tokentype)_embeddings\.weight", WHOLE),
        (r"attention\.query_key_value" + _WEIGHT_OR_BIAS, QKV_ALIKE),
        (r"attention\.dense\.weight", OUTPUT),
        (r"(mlp|deepspeed_experts\.\d+)\.dense_h_to_4h" + _WEIGHT_OR_BIAS, COLUMN_PARALLEL),
        (r"(mlp|deepspeed_experts\.\d+)\.dense_4h_to_h\.weight", ROW_PARALLEL),
        (r"(attention\.dense|dense_4h_to_h)\.bias|\w*layernorm\.(weight|bias)|inv_freq", WHOLE),
        (r"gate\.wg\.weight|mlp\.coefficient\.(weight|bias)", WHOLE),
    )
)

# Layers that DeepSpeed's kernels replaced, with linears turned to [out, in] (injected.py).
INJECTED = CutTable(
    (
        (r"attn_qkv[wb]", QKV),
        (r"attn_q[wb]", QUERIES),
        (r"attn_[kv][wb]", KEYS),
        (r"attn_ow", OUTPUT),
        (r"inter(_up|_gate)?_[wb]", COLUMN_PARALLEL),
        (r"output_w", ROW_PARALLEL),
        (r"attn_(ob|nw|nb)|output_b|norm_[wb]", WHOLE),
        *HUGGING_FACE.rules,
    )
)


def table_for(names: Iterable[str]) -> CutTable:
    """The table of the layout whose names these are, Hugging Face's where nothing says otherwise."""
    endings = {".".join(name.split(".")[-3:]) for name in names}
    if any(ending.endswith(".attn_qkvw") for ending in endings):
        return INJECTED
    if any(ending.endswith("attn.c_attn.weight") for ending in endings):
        return GPT2
    return HUGGING_FACE
