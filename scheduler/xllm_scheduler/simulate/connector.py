"""The KV connector of a simulated instance: the scheduler's side of a transfer, without the bytes.

A request carries, as with vLLM's NIXL connector, ``do_remote_decode`` at the instance that
prefills and ``do_remote_prefill`` at the one that generates. The cluster takes the transfers that
are due, times them, and reports their end with a step's output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)


class Transfer(NamedTuple):
    """KV that an instance waits for.

    Attributes:
        request_id: the request, at the receiver and at the sender.
        sender: the instance that has it.
        tokens: for how many tokens.
    """

    request_id: str
    sender: str
    tokens: int


class SimulatedTransfer(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.due: list[Transfer] = []

    def take_due(self) -> list[Transfer]:
        """The transfers that were asked for since the last call."""
        due, self.due = self.due, []
        return due

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """All of the prompt that the prefix cache lacks comes from the sender."""
        params = request.kv_transfer_params or {}
        missing = request.num_prompt_tokens - num_computed_tokens
        if not params.get("do_remote_prefill") or missing <= 0:
            return 0, False
        return missing, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Ask for the transfer into the blocks that were just allocated, if any is needed."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return
        # With nothing to fetch the sender may still let go of its blocks.
        self.due.append(Transfer(request.request_id, params["sender"], num_external_tokens))
        params["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """There is no worker to tell anything."""
        return KVConnectorMetadata()

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks until they have been sent."""
        params = request.kv_transfer_params or {}
        return bool(params.get("do_remote_decode")), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished`."""
        return self.request_finished(request, [])

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """No worker."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No worker."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """No worker."""

    def wait_for_save(self) -> None:
        """No worker."""
