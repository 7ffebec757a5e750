"""The processes of a node and the handles that other processes hold on it.

In: a `NodeConfig`, signals, requests on `node.sock`, messages of the children.
Out: a running node: listeners, children, published snapshots; replies on `node.sock`; the ready line.
Owns: supervisor, agent, control socket, `P2PNode`, the one-liners `store` and `get`.
Never: parses what a remote peer sent, reads chunk bytes, or answers a chunk request.
"""
