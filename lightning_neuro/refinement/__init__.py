"""Who shaped a representation, and when: exact ledgers per class, and the part of every single training sample."""
