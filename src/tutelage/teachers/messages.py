"""Messages between a run and `tutelage serve-teacher`: safetensors with a header of text.

A request has the token ids of a micro-batch and the places whose hidden states are wanted. A reply
repeats, of what was read, all that shows whether it belongs to the request: its checksum and the
checksum of every sequence in the order of the rows, and, of the model, its checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tutelage.data.batch import Batch, Packed
from tutelage.teachers.identity import parts_of
from tutelage.teachers.sequences import sequences_of

VERSION = "1"
"""Of the messages; a server of another one refuses."""
Payload = Literal["float32", "bfloat16"]
PAYLOADS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_TOKENS = 1 << 24
"""Most tokens of a request, padding included."""


class MalformedError(ValueError):
    """A message that is not what it should be; its text is one line."""


@dataclass(frozen=True)
class Request:
    """What a server was asked for."""

    batch: Batch
    nonce: str
    payload: Payload
    head: str
    """`Identity.head` of the model that the run means."""
    checksum: str
    """SHA-256 of the message."""


def packed_request(batch: Batch, nonce: str, payload: Payload, head: str) -> bytes:
    """The message that asks for the hidden states of a batch's rows.

    Raises:
        ValueError: a layout that no run has.
    """
    if batch.packed is None and not batch.is_padded_right:
        raise ValueError("a batch for a server is padded on the right, or packed.")
    lengths = batch.attention_mask.sum(1) if batch.packed is None else batch.packed.lengths
    tensors = {
        "input_ids": batch.input_ids.cpu().to(torch.int32).contiguous(),
        "lengths": torch.as_tensor(lengths).cpu().to(torch.int32),
        "row_index": batch.row_index.cpu().to(torch.int64).contiguous(),
    }
    layout = "packed" if batch.packed is not None else "padded"
    header = {"version": VERSION, "nonce": nonce, "payload": payload, "layout": layout}
    return save(tensors, header | {"head": head})


def read_request(content: bytes) -> Request:
    """The request in a message.

    Raises:
        MalformedError: it is none.
    """
    tensors, header = _opened(content)
    if header.get("version") != VERSION:
        raise MalformedError(f"version {header.get('version')!r}, and this is {VERSION}")
    ids = _tensor(tensors, "input_ids", torch.int32, 2)
    lengths = _tensor(tensors, "lengths", torch.int32, 1)
    rows = _tensor(tensors, "row_index", torch.int64, 1)
    payload, layout = header.get("payload"), header.get("layout")
    if payload not in PAYLOADS:
        raise MalformedError(f"payload {payload!r}, which is none of {', '.join(PAYLOADS)}")
    if not 0 < ids.numel() <= MAX_TOKENS or not lengths.numel() or int(lengths.min()) < 1:
        raise MalformedError(f"{ids.numel()} tokens in {lengths.numel()} sequences")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= ids.numel()):
        raise MalformedError("rows outside its tokens")
    batch = _batch(ids.long(), lengths.long(), rows, str(layout))
    checksum = hashlib.sha256(content).hexdigest()
    names = (header.get("nonce", ""), payload, header.get("head", ""))
    return Request(
        batch, names[0], "float32" if payload == "float32" else "bfloat16", names[2], checksum
    )


def _batch(ids: Tensor, lengths: Tensor, rows: Tensor, layout: str) -> Batch:
    """The batch as the run has it, as far as a forward pass reads it."""
    place = torch.arange(ids.shape[1])[None]
    if layout == "packed":
        if len(ids) != 1 or int(lengths.sum()) != ids.shape[1]:
            raise MalformedError("lengths that do not fit its tokens")
        packed = Packed.of(lengths.tolist())
        starts = torch.repeat_interleave(packed.starts[:-1].long(), lengths)
        mask, position = torch.ones_like(ids), place - starts[None]
    elif layout == "padded":
        if len(ids) != len(lengths) or int(lengths.max()) > ids.shape[1]:
            raise MalformedError("lengths that do not fit its tokens")
        packed, mask = None, (place < lengths[:, None]).long()
        position = place * mask
    else:
        raise MalformedError(f"layout {layout!r}, which is neither padded nor packed")
    none = torch.zeros_like(rows)
    return Batch(ids, mask, position, rows, none, none, none, packed is None, packed)


def sequence_checksums(batch: Batch) -> Tensor:
    """SHA-256 of each sequence's ids and places, in the order of the rows, uint8 `[B, 32]`.

    Raises:
        MalformedError: rows do not lie in the order of the sequences.
    """
    try:
        sequences = sequences_of(batch)
    except (ValueError, RuntimeError):
        raise MalformedError("rows that do not lie in the order of the sequences") from None
    digests = [hashlib.sha256(str((one.ids, one.places)).encode()).digest() for one in sequences]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).reshape(-1, 32)


def packed_reply(request: Request, hidden: Tensor, head: str, weights: str) -> bytes:
    """The message with hidden states of a request's rows.

    Args:
        request: it.
        hidden: `[N, D]`.
        head: `Identity.head` of the model that computed them.
        weights: `weights_checksum` of it.
    """
    sent = hidden.to(PAYLOADS[request.payload]).cpu().contiguous()
    tensors = {"hidden": sent, "sequences": sequence_checksums(request.batch)}
    header = {
        "version": VERSION,
        "nonce": request.nonce,
        "request": request.checksum,
        "payload": request.payload,
        "head": head,
        "weights": weights,
        "hidden": checksum_of(sent),
    }
    return save(tensors, header)


def checksum_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for part in parts_of(tensor):
        digest.update(part)
    return digest.hexdigest()


def reply_bytes(num_rows: int, hidden_size: int, num_sequences: int, payload: Payload) -> int:
    """Bytes that a reply cannot exceed."""
    return num_rows * hidden_size * PAYLOADS[payload].itemsize + 32 * num_sequences + (1 << 16)


def read_reply(
    content: bytes,
    sent: bytes,
    batch: Batch,
    payload: Payload,
    expected: Mapping[str, str],
    size: int,
) -> Tensor:
    """The hidden states `[N, D]` in a reply to a request.

    Args:
        content: the reply.
        sent: the request.
        batch: what was asked for.
        payload: the dtype that was asked for.
        expected: `nonce`, `head` and `weights` as they have to be.
        size: D.

    Raises:
        MalformedError: it is no reply to this request by this model.
    """
    tensors, header = _opened(content)
    known = {
        "version": VERSION,
        **expected,
        "payload": payload,
        "request": hashlib.sha256(sent).hexdigest(),
    }
    reasons = {
        "version": "of another version",
        "nonce": "to another request",
        "head": "of another model",
        "weights": "of other weights than at the start",
        "payload": "in another dtype",
        "request": "to other token ids than were sent",
    }
    for name, value in known.items():
        if header.get(name) != value:
            raise MalformedError(f"a reply {reasons[name]}")
    if set(tensors) != {"hidden", "sequences"}:
        raise MalformedError(f"a reply with the tensors {', '.join(sorted(tensors)) or 'none'}")
    hidden = _tensor(tensors, "hidden", PAYLOADS[payload], 2)
    sequences = _tensor(tensors, "sequences", torch.uint8, 2)
    if hidden.shape != (batch.num_rows, size):
        raise MalformedError(
            f"a reply with hidden states of the shape {tuple(hidden.shape)} for "
            f"{(batch.num_rows, size)}"
        )
    if not torch.equal(sequences, sequence_checksums(batch)):
        raise MalformedError("a reply whose sequences are others, or in another order")
    if header.get("hidden") != checksum_of(hidden):
        raise MalformedError("a reply whose hidden states do not have their checksum")
    if not bool(hidden.isfinite().all()):
        raise MalformedError("a reply with hidden states that are not finite")
    return hidden


def _opened(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a message."""
    try:
        tensors = load(content)
        return tensors, _header(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise MalformedError(f"no safetensors: {reason}") from None


def _header(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    found: Any = json.loads(content[8 : 8 + length]).get("__metadata__")
    if not isinstance(found, dict):
        raise ValueError("no header")
    return {str(key): str(value) for key, value in found.items()}


def _tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    found = tensors.get(name)
    if found is None:
        raise MalformedError(f"no tensor {name!r}")
    if found.dtype != dtype or found.ndim != ndim:
        raise MalformedError(f"{name} of {found.dtype} and shape {tuple(found.shape)}")
    return found
