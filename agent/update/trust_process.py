"""The verifying process: judges what it is told to and ends. Its libraries' memory is never the supervisor's."""

from __future__ import annotations

from pathlib import Path

from agent.children import inherited_socket
from agent.protocol.messages import TrustPiece
from agent.serving.framing import FrameChannel
from agent.update.trust import PieceFetcher, TrustClient, TrustError, UnavailableError
from agent.update.trust_ipc import Ask, CheckTargets, Later, Piece, Target, ToTrust, Verdict


def main() -> None:
    """Take one order on the inherited socket."""
    channel = FrameChannel(inherited_socket(), ToTrust)
    order = channel.receive()
    if isinstance(order, CheckTargets):
        judge(order, channel)
    channel.close()


def judge(order: CheckTargets, channel: FrameChannel) -> None:
    """Answer with a verdict a job, or with `Later` for those that have none."""

    def ask(file: str, offset: int) -> TrustPiece:
        channel.send(Ask(file, offset))
        answer = channel.receive()
        if not isinstance(answer, Piece) or answer.piece is None:
            raise UnavailableError(f"the server did not send {file}")
        return answer.piece

    try:
        client = TrustClient(
            Path(order.folder), order.root, PieceFetcher(ask), first_use=order.first_use, grace_s=order.grace_s
        )
        client.refresh()
    except UnavailableError as error:
        channel.send(Later(str(error)))
        return
    except TrustError as error:
        for key in order.jobs:
            channel.send(Verdict(key, error.code, error.detail))
        return
    for key, targets in order.jobs.items():
        channel.send(_verdict(client, key, targets))


def _verdict(client: TrustClient, key: str, targets: tuple[Target, ...]) -> Verdict | Later:
    try:
        for target in targets:
            client.check(target.path, target.content)
    except UnavailableError as error:
        return Later(str(error))
    except TrustError as error:
        return Verdict(key, error.code, error.detail)
    return Verdict(key)


if __name__ == "__main__":
    main()
