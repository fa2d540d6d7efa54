"""Who shaped a layer: exact ledgers of classes and phases, and the part of every training sample."""
