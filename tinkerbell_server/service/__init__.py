"""What a server does with requests, whatever their API: intake, queue, engines, results. Imports no API, no torch."""
