"""The data plane: worker processes that answer HTTP from the chunk table and the blobs.

In: HTTP requests on a listener, chunk tables, have logs and swarm snapshots from the agent.
Out: chunks, manifests, files, swarm answers; counters; reports of peers and of blobs that changed.
Owns: the connections, the engine (csrc/engine), the wire grammar (csrc/http) and its limits.
Never: opens the catalog, writes a blob or the table, asks another process to answer a request.
"""

from __future__ import annotations
