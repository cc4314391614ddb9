"""Commands: scripts in tools/, and once installed wsbcn-train, wsbcn-predict, wsbcn-convert."""
