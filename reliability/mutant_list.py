"""The mutants: by file (a pattern below src/tutelage), the guarding tests, and what is replaced.

Those of `tutelage.core` are in `mutant_list_core`, those of conversations in `mutant_list_agents`,
those of several processes in `mutant_list_processes`.

A text has to occur once in its file. One that no longer does is left out and counted.
"""

from __future__ import annotations

from .mutant_list_core import Group

MUTANTS: dict[str, Group] = {
    "models/load.py": (
        ["models/test_cpu_products.py"],
        [("        use_fast_layers(model)\n", "        pass\n")],
    ),
    "models/reference.py": (
        ["models/test_damaged_models.py"],
        [
            ('rglob("*.safetensors.index.json")', 'glob("model.safetensors.index.json")'),
            ("            if PurePosixPath(name).is_absolute() or", "            if"),
            ("if isinstance(modules[place], nn.ModuleList):", "if False:"),
        ],
    ),
    "models/llama_cpu/ops.py": (
        ["models/test_llama_ops.py", "models/test_backbone.py"],
        [
            (".mean(-1, keepdim=True).add_(eps).rsqrt_()", ".mean(-1, keepdim=True).rsqrt_()"),
            ("if needs_weight:  #", "if needs_x:  #"),
            ("(product * r).reshape", "product.reshape"),
            ("r.pow(3) / -x.shape[-1]", "r.pow(3) / x.shape[-1]"),
            ("r.pow(3) / -x.shape[-1]", "r.pow(2) / -x.shape[-1]"),
            ("out=product).mul_(r).addcmul_(x, slope)", "out=product).mul_(r)"),
            (
                "return _turned(x, cos, first.neg(), second)",
                "return _turned(x, cos, first, second)",
            ),
            (
                "return _turned(grad, cos, second, first.neg()), None, None",
                "return _turned(grad, cos, first.neg(), second), None, None",
            ),
            ("x.chunk(2, -1)[::-1]", "x.chunk(2, -1)"),
            ("return F.silu(gate).mul_(up)", "return F.gelu(gate).mul_(up)"),
            ("silu_backward(grad * up, gate), grad_up", "silu_backward(grad, gate), grad_up"),
            ("grad_up = F.silu(gate).mul_(grad)", "grad_up = gate * grad"),
        ],
    ),
    "models/llama_cpu/forward.py": (
        [
            "models/test_backbone.py",
            "models/test_optimizer_memory.py",
            "models/test_precision_and_adapters.py",
        ],
        [
            ("if not is_fast_family(model) or", "if"),
            ("or not attends_by_sdpa(model)", "or False"),
            (" and weight.dtype == torch.float32", ""),
            (" and not base.layers[0].training", ""),
            (
                "x = _through(layer, x, cos, sin, 0)",
                "x = _through(layer, x, cos, sin, first)[:, :]",
            ),
            ("base.norm(_through(last, x, cos, sin, first))", "_through(last, x, cos, sin, first)"),
            ("x = x[:, first:] + read", "x = read"),
            ("layer.post_attention_layernorm(x))\n\n\ndef _trans", "x)\n\n\ndef _trans"),
            ('if mlp.config.hidden_act != "silu":', "if False:"),
            (
                "swiglu(mlp.gate_proj(x), mlp.up_proj(x))",
                "swiglu(mlp.up_proj(x), mlp.gate_proj(x))",
            ),
            (
                "rotate(q, cos[:, after], sin[:, after])",
                "rotate(q, cos[:, : q.shape[1]], sin[:, : q.shape[1]])",
            ),
            (".tril(first)", ".tril(first + 1)"),
            ("is_causal=mask is None,", "is_causal=False,"),
            ("        scale=attention.scaling,\n", ""),
            ('if "q_norm" in norms:', "if False:"),
        ],
    ),
    "models/head.py": (
        ["models/test_backbone.py", "models/test_families.py", "setup/test_trial.py"],
        [
            (
                "skipped = (batch.row_index // width + 1) * first",
                "skipped = batch.row_index // width * first",
            ),
            ("int((batch.row_index % width).min())", "int((batch.row_index % width).max())"),
            (" and batch.num_rows and is_written_out(model)", " and is_written_out(model)"),
            ("HeadForm(scale * before, form.softcap)", "HeadForm(scale, form.softcap)"),
            ("HeadForm(scale * before, form.softcap)", "HeadForm(before, form.softcap)"),
            ("HeadForm(scale * before, form.softcap)", "HeadForm(scale * before, None)"),
            ("and not batch.is_padded_right:", "and False:"),
        ],
    ),
    "models/llama_cpu/layers.py": (
        ["rollout/test_sampling_fast.py"],
        [
            ("root * eps**0.5", "root * eps"),
            (
                "return torch.mul(self.direction(x), self.scale, out=out)",
                "return torch.mul(self.direction(x), self.weight, out=out)",
            ),
            (
                "turned = [(attention.q_proj, width), (attention.k_proj, width)",
                "turned = [(attention.q_proj, width), (attention.k_proj, 0)",
            ),
            (
                "torch.cat((q.expand(num_heads, -1), k.expand(num_groups, -1)))",
                "torch.cat((k.expand(num_heads, -1), q.expand(num_groups, -1)))",
            ),
            ("qk_norm = Norm(interleaved(weight)", "qk_norm = Norm(weight"),
            ("len(biases) not in (0, len(plain))", "False"),
            ("[_by_head(b, w) for b, w in", "[b for b, w in"),
            ("folded = weight * before.scale", "folded = weight"),
            (
                "torch.cat([_by_head(call(x), width) for call, width in calls], dim=-1)",
                "torch.cat([call(x) for call, width in calls], dim=-1)",
            ),
            (' and "bias" not in dict(module.named_parameters())', ""),
            ("    return lambda x, y: x + call(y)", "    return lambda x, y: call(y)"),
            ("return type(module) in (nn.Linear, Linear)", "return isinstance(module, nn.Linear)"),
            ("return is_full and window is None", "return is_full"),
        ],
    ),
    "rollout/slots.py": (
        ["setup/test_trial.py", "rollout/test_sampling.py", "rollout/test_sampling_fast.py"],
        [
            ("self.keep(torch.tensor([row[ids] for ids in prompts], device=device))", "pass"),
            (
                "position = (self.mask.cumsum(1) - 1).clamp(min=0)",
                "position = self.mask.cumsum(1).clamp(min=0)",
            ),
            ("self.cache.reorder_cache(index)", "pass"),
            ("self.cache.reorder_cache(index)", "self.cache.batch_select_indices(index)"),
            (
                "if gap <= rounding(model):\n            return form",
                "if True:\n            return form",
            ),
            ("[index.argsort()]", ""),
            ("groups.append((slots, new))", "groups.append((slots, mine))"),
            (".matches_model(prompt)", ".refills"),
        ],
    ),
    "models/llama_cpu/decode.py": (
        ["rollout/test_sampling_fast.py", "rollout/test_sampling.py"],
        [
            ("(tuple(dict.fromkeys((*prompt, *others))) * TRIAL_TOKENS)", "(prompt * _TRIAL)"),
            ("return bool(error <= eps**0.5)", "return not error > eps**0.5"),
            ("            cache[:, to] = 0  # a masked", "            pass  # a masked"),
            ("layers = [(k[rows], v[rows]) for k, v in self.layers]", "layers = self.layers"),
            ("self.hidden[rows], layers)", "self.hidden, layers)"),
            ("if ids not in known:\n                chosen", "if True:\n                chosen"),
            ("index_fill_(0, (index.rows + self.position[:, None]).view(-1), 0.0)", "add_(0.0)"),
            (
                "turn = self.turn.index_select(0, self.position)",
                "turn = self.turn.index_select(0, self.position - 1)",
            ),
            (
                "up)\n        self.hidden = self.norm(x)\n",
                "up.neg())\n        self.hidden = self.norm(x)\n",
            ),
            ("(self.position + 1).clamp_(max=self.max_length - 1)", "self.position + 1"),
            ("self.end = min(self.end + 1, self.max_length - 1)", "self.end = self.end"),
            ("self.caches = [cache[:, index] for cache in self.caches]", "pass"),
            ("rows + rows.numel() * room", "rows"),
            ("if layer.qk_norm is not None:", "if False:"),
            ("alpha=self.scale", "alpha=1.0"),
            (
                "cache[0][to, :, :width] = interleaved(keys[start, :, :width])",
                "cache[0][to, :, :width] = keys[start, :, :width]",
            ),
            (
                "self.position[to] = torch.tensor(lengths",
                "self.position[to] = torch.tensor([width] * len(lengths)",
            ),
            ("F.pad(cache, (0, 0, 0, added))", "F.pad(cache, (0, 0, added, 0))"),
        ],
    ),
    "rollout/generate.py": (
        ["rollout/test_sampling_fast.py", "rollout/test_sampling.py"],
        [
            ("first = [len(row.tokens) - len(row.pending) if row", "first = [0 if row"),
            ("tokens[i] in self.stops or num_left == step", "tokens[i] in self.stops"),
            ("row.tokens += by_row[i][start:stop]", "row.tokens += by_row[i]"),
            ("hidden_by_row[i, start:stop]", "hidden_by_row[i]"),
            ("check_finite(logprobs_by_row[i][start:stop], len(row.tokens))", "pass"),
            (
                "check_finite(logprobs_by_row[i][start:stop], len(row.tokens))",
                "check_finite(logprobs_by_row[i][start:stop], 0)",
            ),
            ("check_finite(logprobs_by_row[i][start:stop],", "check_finite(logprobs_by_row[i],"),
            ("    model.eval()\n    try", "    try"),
            ("            module.training = True", "            pass"),
            (
                "vocabulary_size(self.tokenizer),",
                "",
            ),
        ],
    ),
    "rollout/sample_token.py": (
        ["rollout/test_sampling.py", "rollout/test_sampling_fast.py"],
        [
            ("logits / config.temperature if is_warm else logits", "logits"),
            ("uniform * cumulative[:, -1:])", "uniform)"),
            (
                "threshold - (cumulative - sums).gather(1, block)",
                "threshold - cumulative.gather(1, block)",
            ),
            ("right=True", "right=False"),
            ("ranked[:, config.top_k :] = 0.0", "ranked[:, config.top_k + 1 :] = 0.0"),
            ("ranked[before >= config.top_p", "ranked[before > config.top_p"),
            ("threshold.minimum(last)", "threshold"),
            ("+ index * GOLDEN", "+ index"),
        ],
    ),
    "models/packing.py": (
        ["models/test_packing.py"],
        [
            ("window - 1 if window else -1", "window if window else -1"),
            ("triu(1 - window)", "triu(-window)"),
            ("else _window_mask(query, sliding_window)", "else None"),
            (" and n not in _KNOWN", " and False"),
            ("enable_gqa=query.shape[1] != key.shape[1]", "enable_gqa=False"),
            ("is_causal=window is None or window >= q.shape[2]", "is_causal=False"),
            ("not is_llama_like(model) or not", "not"),
        ],
    ),
    "models/liger.py": (
        ["models/test_liger.py"],
        [
            ("if not gap <= rounding(model):", "if False:"),
            ("if not is_llama_like(model) or ", "if "),
            ('or model.config.to_dict().get("hidden_act") != "silu"', ""),
            ("    elif kind in _UNITS:\n", "    elif False:\n"),
        ],
    ),
    "models/optimizer.py": (
        ["models/test_optimizer_memory.py", "models/test_precision_and_adapters.py"],
        [
            ("if master.grad is None else master.grad.add_(grad)", ""),
            ("            weight.copy_(master)\n", "            pass\n"),
            ("sizes = [2 * whole_pages(weight.nbytes)", "sizes = [whole_pages(weight.nbytes)"),
            ("            start += size\n", "            start += 0\n"),
            ('"exp_avg_sq": start + size // 2', '"exp_avg_sq": start'),
            ("state[name] = mapped.copy_(state[name])", "state[name] = mapped"),
            ('        state["step"] += 1\n', ""),
            ('step = state["step"].clone()', 'step = state["step"]'),
            ('weight_decay=group["weight_decay"],', "weight_decay=0.0,"),
            ('eps=group["eps"],', "eps=1e-3,"),
            ("self._file.release(first + low * weight.itemsize, num_bytes)", "pass"),
            ("self.release()  # with a page", "pass  # with a page"),
        ],
    ),
    "models/offload.py": (
        ["models/test_optimizer_memory.py", "models/test_teacher_modes.py"],
        [
            ("os.posix_fallocate(file.fileno(), 0, num_bytes)", "file.truncate(num_bytes)"),
            ("self._map.madvise(mmap.MADV_DONTNEED, start, num_bytes)", "pass"),
            ("return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE", "return num_bytes"),
            ("mmap.mmap(file.fileno(), num_bytes)", "mmap.mmap(-1, num_bytes)"),
        ],
    ),
    "models/teacher.py": (
        ["models/test_teacher_modes.py"],
        [
            ("self._used_bytes += hidden.nbytes", "pass"),
            ("        self._used_bytes = 0\n\n    def keep", "        pass\n\n    def keep"),
            ("                self._model = None\n", ""),
            ("weight = weight.clone()  # a part", "weight = weight  # a part"),
            ("            read_into_memory(model)", "            pass"),
        ],
    ),
    "models/host_weights.py": (
        ["models/test_teacher_modes.py"],
        [
            ("            weight.data = value\n            module", "            module"),
            ("            if module._buffers.get(name) is copy:", "            if True:"),
            ('        model.to("cpu")  # the rest', "        pass"),
        ],
    ),
    "setup/teacher.py": (
        ["models/test_teacher_modes.py", "models/test_optimizer_memory.py"],
        [
            ("if _versions(found) != known:", "if False:"),
            ('return "reload"\n', "return config.mode\n"),
        ],
    ),
    "data/batch.py": (
        ["data/test_batch.py", "invariance/test_step.py", "invariance/test_packed.py"],
        [
            ("packed.starts[sequence] + flat.row_index % width", "packed.starts[sequence]"),
            ("first_tokens = sum(self.packed", "first_tokens = 1 + sum(self.packed"),
            ("left[found] -= lengths[i]", "left[found] -= 1"),
            ("+ position - 1\n", "+ position\n"),
            ('offset = width - total if side == "left" else torch', "offset = torch"),
            ("attention_mask=is_real.long()", "attention_mask=(input_ids != pad_id).long()"),
            ("position_ids=place * is_real", "position_ids=torch.arange(width).expand_as(place)"),
            ("torch.tensor(names, dtype=torch.long)[sequence]", "sequence"),
            (
                "torch.repeat_interleave(torch.arange(len(rollouts)), lengths)",
                "torch.repeat_interleave(torch.arange(len(rollouts)), lengths.flip(0))",
            ),
        ],
    ),
    "rollout/cuda/generate.py": (
        ["rollout/test_generate.py"],
        [
            ("most = min(segment.count, self._num", "most = max(segment.count, self._num"),
            ("for n, token in enumerate(new, 1)", "for n, token in enumerate(new, 2)"),
            ("self.free_slots.append(row.slot)", "self.free_slots.append(0)"),
            ("states[source, length - 1]", "states[source, -1]"),
            ("rows.position[to] = length.int()", "rows.position[to] = length.int() - 1"),
            ("state[:count] = state[index]", "pass"),
            ("row.hidden.append(segment.states[i, :end])", "row.hidden.append(segment.states[i])"),
            ("started = [row.num_started if row", "started = [0 if row"),
        ],
    ),
    "rollout/cuda/kv_slots.py": (
        ["rollout/test_generate.py"],
        [
            ("is_large and self.step.is_current(model)", "is_large"),
            ("capacity <= self.capacity\n", "True\n"),
            (
                "padded = [*stops, *[-1] * (room - len(stops))]",
                "padded = [*stops, *[0] * (room - len(stops))]",
            ),
            ("return bool(error <= eps**0.5)", "return True"),
        ],
    ),
    "rollout/cuda/sample_kernels.py": (
        ["rollout/test_decoding_kernels.py"],
        [
            (
                "threshold - tl.sum(tl.where(which < block, weight",
                "threshold - tl.sum(tl.where(which <= block, weight",
            ),
            ("is_stop = tl.max((stop == picked)", "is_stop = tl.min((stop == picked)"),
        ],
    ),
    "train/checkpoint_thread.py": (
        ["train/test_checkpoint.py"],
        [
            (
                "copies[key].copy_(tensor.detach(), non_blocking=True)",
                "copies[key] = tensor.detach()",
            ),
            ("            writing.result()", "            pass"),
            ("num_bytes > free", "num_bytes < 0"),
        ],
    ),
    "evaluation/verdict.py": (
        ["evaluation/test_verdict.py"],
        [
            ("change = paired_difference(b, a)", "change = paired_difference(a, b)"),
            ("if share >= _CUT_OFF:", "if False:"),
            ("Interval(-change.value, -change.high, -change.low)", "change"),
            ("if num_problems < _FEWEST_PROBLEMS:", "if False:"),
        ],
    ),
    "train/distributed.py": (
        ["invariance/test_selection_ranks.py", "invariance/test_ranks.py"],
        [
            (
                'reduce(flat.to(self.accelerator.device), "sum")',
                'reduce(flat.to(self.accelerator.device), "mean")',
            ),
            ("first = sum(sizes[: self.index])", "first = 0"),
            ("        order = order[table[-2][order].argsort(stable=True)]\n", ""),
            ("part[:, :n] for part", "part for part"),
        ],
    ),
    "train/selection.py": (
        ["invariance/test_step.py", "train/test_step_selection.py", "invariance/test_updates.py"],
        [
            ("        completion = completion[selection.rows]\n", "        pass\n"),
            ("nonzero_static(mask, size=count)", "nonzero_static(mask.flip(0), size=count)"),
            (
                "weighting[chosen.rows] * chosen.weights",
                "weighting[chosen.rows]",
            ),
        ],
    ),
    "train/update.py": (
        ["train/test_skipped_steps.py", "invariance/test_step.py", "invariance/test_ranks.py"],
        [
            ("micro_batch, 1 / max(divisor, 1))", "micro_batch, 2 / max(divisor, 1))"),
            (
                "(objective.total * scale).backward()",
                "objective.total.backward()",
            ),
            ("if not (math.isfinite(norm) and math.isfinite(total)):", "if False:"),
            ("total = total + one[0]", "total = one[0]"),
            ("if 0 < limit < norm:", "if 0 < norm < limit:"),
        ],
    ),
    "files/atomic.py": (
        ["train/test_checkpoint.py"],
        [
            (
                "            temporary.replace(target)\n        sync(",
                "            shutil.copytree(temporary, target)\n        sync(",
            ),
            ("        sync_tree(temporary)\n", "        pass\n"),
            (
                "        sync(target.parent)\n    finally:\n",
                "        pass\n    finally:\n",
            ),
            (
                "    temporary = temporary_beside(target)\n    shutil",
                "    temporary = target\n    shutil",
            ),
        ],
    ),
    "files/checksums.py": (
        ["train/test_checkpoint.py"],
        [
            ("        if name not in expected:\n", "        if False:\n"),
            ("        if found[name] != expected[name]:\n", "        if False:\n"),
            (
                'for key, value in table.items() if key != "digest"}) != text',
                "for key, value in table.items()}) == ''",
            ),
        ],
    ),
    "train/checkpoint.py": (
        ["train/test_checkpoint.py", "train/test_train.py"],
        [
            ("[:-keep]", "[: -keep - 1]"),
            ("return sorted(found)", "return found[::-1]"),
            (
                "                state[index][entry] = tensor\n".replace(
                    "                ", "            "
                ),
                "            state[index][entry] = tensor * 0\n",
            ),
            (
                'seal(temporary, {"step": snapshot.step})',
                'seal(temporary, {"step": snapshot.step + 1})',
            ),
            ("                    if weight is None:\n", "                    if False:\n"),
            ('if unseal(path) != {"step": step}:', "if unseal(path) is None:"),
        ],
    ),
    "grading/*.py": (
        ["grading/test_grading*.py"],
        [
            ("text = completion[-MAX_TEXT:]", "text = completion[:MAX_TEXT]"),
            ("if any(marks[-1].groups()) else None", "if True else None"),
            ("if not any(found.groups()) and", "if"),
            (
                "above is not None and below else None",
                "above is not None and below is not None else None",
            ),
            ('return -value if sign == "-" else value', "return value"),
            ("    if abs(power) > MAX_EXPONENT:\n        return None\n", ""),
            ('if depth == 0 and brace[0] == "}":', 'if depth <= 1 and brace[0] == "}":'),
            ("text[boxes[-1].end() :]", "text[boxes[0].end() :]"),
            ("split(stated[-1]", "split(stated[0]"),
        ],
    ),
    "models/forward.py": (
        ["rollout/test_sampling_fast.py"],
        [
            ("not (hooked or is_cast)", "not is_cast"),
            ("not (hooked or is_cast)", "not hooked"),
            ("m._forward_hooks or m._forward_pre_hooks", "m._forward_hooks"),
            ('"llama3", "yarn"}', '"llama3"}'),
            ('"llama3", "yarn"}', '"llama3", "yarn", "longrope"}'),
            (' and rope.get("partial_rotary_factor", 1) == 1', ""),
        ],
    ),
    "models/llama_cpu/products.py": (
        ["models/test_cpu_products.py"],
        [
            ("linear(grad, weight.t()) if needs_x", "linear(grad, weight.t()) if needs_weight"),
            ("rows.sum(0) if needs_bias", "rows.mean(0) if needs_bias"),
            ("bias is None else bias.contiguous()", "bias is None else bias"),
            (
                "        return linear(input, self.weight",
                "        return F.linear(input, self.weight",
            ),
            ('return "AuthenticAMD" in', 'return "GenuineIntel" in'),
            ("a.dtype == b.dtype == torch.float32", "a.dtype == b.dtype"),
            ("    if not has_operator or torch", "    if True or torch"),
            ("if is_forward_mode or not _suits", "if not _suits"),
        ],
    ),
    "models/llama_cpu/patch.py": (
        ["models/test_cpu_products.py"],
        [
            ("if kind is nn.Linear:", "if isinstance(layer, nn.Linear):"),
        ],
    ),
}
