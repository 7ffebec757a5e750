"""The DHT process: finding peers over UDP on a hardened `kademlia`, in a process of its own.

In: datagrams from anybody, ring requests and key snapshots from the owner, a bootstrap list, saved contacts.
Out: datagrams of at most 1,200 B, ring answers with peer hints, a state file.
Owns: the UDP sockets, the routing table, other nodes' records, the announcing of what this node has.
Never: sends to who did not ask, believes a contact, an address or a record unchecked, touches file contents.
"""
