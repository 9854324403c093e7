"""What stands before the routes, from the outside in."""

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from jaxserve.server.buckets import Quotas
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import Door, Origins
from jaxserve.server.gate import Gate
from jaxserve.server.keys import keys_of


def guards(config: ServerConfig, quotas: Quotas) -> list[Middleware]:
    """Other sites' pages, keys, limits.

    Raises:
      ConfigError: keys that cannot be read.
    """
    found = list[Middleware]()
    if config.cors_allow_origin:  # before the door: browsers ask without a key whether they may ask
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_allow_origin),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
                max_age=3600,
            )
        )
    found.append(Middleware(Origins, allowed=config.cors_allow_origin))
    if config.has_keys:
        found.append(Middleware(Door, keys=keys_of(config)))
    found.append(Middleware(Gate, config=config, quotas=quotas))
    return found
