"""A request's body, within bounds of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from dycoke.serve.protocol import ApiError


async def read_body(request: Request, too_large: ApiError, most: int, patience: float) -> bytes:
    """The whole body.

    Parameters
    ----------
    too_large : raised for one of more than ``most`` bytes.
    patience : seconds in which its next piece must come.

    Raises
    ------
    ApiError
        ``too_large``; 408 where the rest does not come; 499 where the client has gone.
    """
    body, pieces = bytearray(), aiter(request.stream())
    try:
        while piece := await asyncio.wait_for(anext(pieces, b""), patience):
            body += piece
            if len(body) > most:
                raise too_large
    except TimeoutError:
        raise ApiError(408, "the rest of the body did not come") from None
    except ClientDisconnect:
        raise ApiError(499, "cancelled") from None
    return bytes(body)
