"""pyvolume: a volume server for SeaweedFS clusters."""
