"""What is known of the world: watches, the store they feed, leases, live grid intensity, the admission desk."""
