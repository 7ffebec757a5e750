"""Who has what: the discovery seam and what this process knows about peers.

In: file and chunk hashes (32 bytes) to look for or to announce; what happened with a peer.
Out: peer hints, metadata hints, verdicts about addresses. Hints only: nothing here is proof of anything.
Owns: the `Discovery` protocol and its local backends, the peer book, the address policy, `P2PPeerManager`.
Never: speaks UDP or HTTP, trusts a hint, imports the DHT or the fetch path.
"""
